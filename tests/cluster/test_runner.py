"""The supervisor's decisions: when a training starts again, when it is given up, how it stops."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import cli, runner
from cluster.compose import compose
from cluster.configfile import load_config, save_config
from cluster.job import TrainJob
from cluster.runner import RunFailed, Stopped, TrainerGroup
from cluster.stages import Work
from distill.config import ConfigError
from distill.rundir import RunDir, append_line, read_lines


@dataclass
class Bars:
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
    def __init__(self, config, folder):
        self.config, self.run, self.scratch = config, RunDir(folder), folder
        self.bars, self.stop_signal, self.lost = Bars(), 0, ""

    def start_ray(self):
        pass

    def lost_daemon(self):
        return self.lost


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL_PERIOD_S", 0.001)
    (config,) = compose(
        ["experiment=tiny", f"run.dir={tmp_path}", "cluster.trainer.max_restarts=2"]
    )
    return Session(config, tmp_path)


@pytest.fixture
def job(session):
    return TrainJob("train", session.config, None, session.scratch)


class Trainings:
    """Stands in for `fit` and the checkpoints: every start reaches the next step of a list."""

    def __init__(self, monkeypatch, verified, error="boom"):
        self.verified, self.starts, self.error = list(verified), 0, error
        monkeypatch.setattr(runner, "fit", self.fit)
        monkeypatch.setattr(runner, "steps_done", lambda run: self.step)
        self.step = 0

    def fit(self, job, name):
        self.step = self.verified[self.starts]
        self.starts += 1
        if self.step == job.train.max_steps:
            return self.step
        raise RuntimeError(self.error)


def run_to_end(group):
    while not group.poll():
        pass


def test_restarts_without_progress_are_bounded(session, job, monkeypatch):
    trainings = Trainings(monkeypatch, [0, 0, 0, 0])
    with pytest.raises(RunFailed, match="failed 3 times without a new verified checkpoint"):
        run_to_end(TrainerGroup(session, job))
    assert trainings.starts == 3  # the first one and max_restarts


def test_a_new_verified_checkpoint_starts_the_count_again(session, job, monkeypatch):
    trainings = Trainings(monkeypatch, [0, 0, 2, 2, 4, 4, 6])
    run_to_end(TrainerGroup(session, job))
    assert trainings.starts == 7
    assert [e["kind"] for e in read_lines(session.run.events)] == ["restart"] * 6


def test_a_group_that_hung_says_where(session, job, monkeypatch):
    """Stacks of an earlier hang are not those of this one."""
    trainings = Trainings(monkeypatch, [0, 2, 6])
    hangs = session.run.hangs
    hangs.mkdir()
    (hangs / "rank_00000.txt").touch()
    os.utime(hangs / "rank_00000.txt", (1, 1))
    once = trainings.fit

    def fit(job, name):
        if trainings.starts == 1:
            (hangs / "rank_00001.txt").touch()
            os.utime(hangs / "rank_00001.txt", (time.time() + 1,) * 2)
        return once(job, name)

    monkeypatch.setattr(runner, "fit", fit)
    run_to_end(TrainerGroup(session, job))
    errors = [event["error"] for event in read_lines(session.run.events)]
    assert errors == ["boom", f"no step for more than 1200 s; {hangs} says where the ranks stood"]


def test_an_error_that_would_only_repeat_ends_the_run_at_once(session, job, monkeypatch):
    trainings = Trainings(monkeypatch, [0])
    job.final.write_text('{"kind": "ConfigError", "message": "train.batch_size=7 ..."}')
    with pytest.raises(ConfigError, match=r"train\.batch_size=7"):
        run_to_end(TrainerGroup(session, job))
    assert trainings.starts == 1


def test_a_training_is_not_started_again_on_a_disk_that_takes_no_files(session, job, monkeypatch):
    trainings = Trainings(monkeypatch, [0])
    session.scratch = Path(__file__)  # no folder
    with pytest.raises(RunFailed, match=r"takes no files \(File exists\)"):
        run_to_end(TrainerGroup(session, job))
    assert trainings.starts == 1


class EndlessPool:
    """A pool that is never done, as under back-pressure."""

    closed = False
    coordinator = None

    def poll(self):
        return False

    def rest(self, seconds):
        time.sleep(seconds)

    def close(self):
        self.closed = True


def test_a_failed_training_is_seen_while_the_pool_is_busy(session, job, monkeypatch):
    Trainings(monkeypatch, [0, 0, 0])
    monkeypatch.setattr(runner, "_show", lambda *_: None)
    pool = EndlessPool()
    with pytest.raises(RunFailed):
        runner._work(session, Work(pool, job))
    assert pool.closed


def test_a_lost_daemon_of_ray_ends_the_run_and_nothing_is_asked_of_ray(session, job, monkeypatch):
    monkeypatch.setattr(runner, "fit", lambda job, name: threading.Event().wait())
    monkeypatch.setattr(runner, "steps_done", lambda run: 0)
    monkeypatch.setattr(runner, "_show", lambda *_: None)
    pool, session.lost = EndlessPool(), "raylet"
    with pytest.raises(RunFailed, match="Ray's raylet has died"):
        runner._work(session, Work(pool, job))
    assert not pool.closed


def test_a_signal_that_ends_ray_too_stops_the_run(session, job, monkeypatch):
    """The supervisor takes SIGTERM to its process group long before a daemon has died of it."""
    monkeypatch.setattr(runner, "fit", lambda job, name: threading.Event().wait())
    monkeypatch.setattr(runner, "steps_done", lambda run: 0)

    def signalled(*_):
        session.stop_signal = signal.SIGTERM

    monkeypatch.setattr(runner, "_show", signalled)
    threading.Timer(0.3, setattr, (session, "lost", "raylet")).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        runner._work(session, Work(None, job))
    assert time.monotonic() - started < runner.STOP_GRACE_S / 2


def test_a_rank_that_stops_on_a_signal_stops_the_run(session, job, monkeypatch):
    monkeypatch.setattr(runner, "fit", lambda job, name: 3)
    monkeypatch.setattr(runner, "steps_done", lambda run: 0)
    monkeypatch.setattr(runner, "_show", lambda *_: None)
    with pytest.raises(Stopped):
        runner._work(session, Work(None, job))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_stops_an_evaluation_at_once(number, code, tmp_path, capsys, monkeypatch):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    reached = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))

    def evaluation(session):
        session.stop_ray()
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        time.sleep(60)
        reached.append("end of the evaluation")

    def next_stage(session):
        reached.append("next stage")

    before, started = signal.getsignal(number), time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        runner.supervise(config, evaluation, next_stage)
    assert stopped.value.code == code
    assert time.monotonic() - started < 10 and reached == []
    assert f"stopped; the same command goes on with {config.run.dir}" in capsys.readouterr().err
    assert signal.getsignal(number) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_signal_that_python_dropped_counts_after_the_stage(tmp_path):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)  # an exception raised here is ignored by Python

    with pytest.raises(SystemExit) as stopped:
        runner.supervise(config, lambda session: Finalised() and Work(), pytest.fail)
    assert stopped.value.code == 0


def test_a_signal_ends_a_command_of_several_runs(tmp_path, monkeypatch):
    begun = []

    def train(config):
        begun.append(config.seed)
        return runner.supervise(config, lambda session: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(runner, "train", train)
    with pytest.raises(SystemExit) as stopped:
        cli.pipeline(
            "train", ["--multirun", "experiment=tiny", f"run.dir={tmp_path}/${{seed}}", "seed=0,1"]
        )
    assert (stopped.value.code, begun) == (0, [0])


@pytest.mark.parametrize("teacher", ["the run's own", "another one"])
def test_absent_images_are_named_before_anything_starts(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.session.Session.start_ray", lambda session: pytest.fail())
    overrides = ["experiment=fashion", f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path}"]
    if teacher == "another one":
        overrides.append("teacher.pretrained.path=elsewhere")
    (config,) = compose(overrides)
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        runner.run(config)


def test_settings_of_a_refused_evaluation_are_not_kept(tmp_path):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    run = RunDir(tmp_path / "run")
    save_config(run, config)
    before = run.config.read_bytes()
    wrong = ["eval.extractor.name=inception", f"eval.extractor.weights={tmp_path / 'FILE'}"]
    for verb in (runner.evaluate, runner.run):
        with pytest.raises(ConfigError, match="FILE is not there; it must be weights-inception"):
            verb(load_config(run, wrong))
        assert run.config.read_bytes() == before


def test_a_full_disk_is_told_in_a_sentence(tmp_path, capsys):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.events.symlink_to("/dev/full")
    assert runner.supervise(config, lambda session: append_line(run.events, {})) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
