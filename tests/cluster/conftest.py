"""What several tests of the cluster write by hand."""

from dataclasses import dataclass, field
from functools import partial

import pytest
from small_manifest import write_manifest

from cluster.settings.hydra import compose
from cluster.supervisor import group, runner
from cluster.trainer.job import TrainJob
from distill.checkpoint.manifest import step_name
from distill.run.files import RunDir


@pytest.fixture(scope="session")
def write_checkpoint():
    """(run, step) -> the folder of a committed checkpoint with one file and without state."""

    def write(run, step):
        folder = run.checkpoints / step_name(step)
        folder.mkdir(parents=True)
        (folder / "rank_00000.safetensors").write_bytes(b"weights")
        write_manifest(folder, step)
        return folder

    return write


# -----------------------------------------------------------------------------------------------
# A supervisor without Ray


@dataclass
class Bars:
    """What was said."""

    lines: list = field(default_factory=list)

    def say(self, text):
        self.lines.append(text)

    def show(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Session:
    """Stands in for the supervisor's hold on Ray."""

    def __init__(self, config, folder):
        self.config, self.run, self.scratch = config, RunDir(folder), folder
        self.bars, self.stop_signal, self.unsaved, self.lost = Bars(), 0, "", ""
        self.ranks = 2  # for which there are nodes

    def nodes(self):
        room = {"trainer": self.ranks, "CPU": 99}
        return [{"Alive": True, "Resources": room, "NodeManagerAddress": "here"}]

    def start_ray(self):
        pass

    def lost_daemon(self):
        return self.lost

    def ray_words(self):
        return ""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session whose nodes answer, and in which nothing takes long."""
    monkeypatch.setattr(runner, "POLL_PERIOD_S", 0.001)
    monkeypatch.setattr(group, "LOOK_PERIOD_S", 0.0)
    monkeypatch.setattr(group, "silent_nodes", lambda nodes: [])
    (config,) = compose(
        ["experiment=tiny", f"run.dir={tmp_path}", "cluster.trainer.max_restarts=2"]
    )
    return Session(config, tmp_path)


@pytest.fixture
def job(session):
    """The training of that session's run."""
    return TrainJob("train", session.config, None, session.scratch, "hash")


class Trainings:
    """Stands in for `fit` and the checkpoints: every start reaches the next step of a list."""

    def __init__(self, monkeypatch, verified, error="boom"):
        self.verified, self.starts, self.error = list(verified), 0, error
        monkeypatch.setattr(group.fit, "fit", self.fit)
        monkeypatch.setattr(group, "steps_done", lambda run: self.step)
        self.step = 0

    def fit(self, job, ranks, name):
        self.step = self.verified[self.starts]
        self.starts += 1
        if self.step == job.train.max_steps:
            return self.step
        raise RuntimeError(self.error)


@pytest.fixture
def trainings(monkeypatch):
    """(steps, [error]) -> trainings that reach these steps, one start after the other."""
    return partial(Trainings, monkeypatch)
