"""The trainer group: when it starts again, when it is given up, and how many ranks it has."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from cluster.plan.placement import group_size, silent_nodes
from cluster.settings.hydra import compose
from cluster.supervisor import group
from cluster.supervisor.group import RunFailed, TrainerGroup
from cluster.trainer.job import TrainJob
from distill.config import ConfigError
from distill.run.files import read_lines
from distill.run.measured import Metrics, append_metrics


def run_to_end(group):
    while not group.poll():
        pass


def test_restarts_without_progress_are_bounded(session, job, trainings):
    made = trainings([0, 0, 0, 0])
    with pytest.raises(RunFailed, match="failed 3 times without a new verified checkpoint"):
        run_to_end(TrainerGroup(session, job))
    assert made.starts == 3  # the first one and max_restarts


def test_a_new_verified_checkpoint_starts_the_count_again(session, job, trainings):
    made = trainings([0, 0, 2, 2, 4, 4, 6])
    run_to_end(TrainerGroup(session, job))
    assert made.starts == 7
    kinds = [event["kind"] for event in read_lines(session.run.events)]
    assert kinds == ["group", "restart"] * 6 + ["group"]


def test_a_group_that_hung_says_where(session, job, trainings, monkeypatch):
    """Stacks of an earlier hang are not those of this one."""
    made = trainings([0, 2, 6])
    hangs = session.run.hangs
    hangs.mkdir()
    (hangs / "rank_00000.txt").write_text("of yesterday")
    once = made.fit

    def fit(job, ranks, name):
        if made.starts == 1:
            (hangs / "rank_00001.txt").write_text("no step")
            os.utime(hangs / "rank_00001.txt", (1, 1))  # by a file server whose clock is wrong
        return once(job, ranks, name)

    monkeypatch.setattr(group.fit, "fit", fit)
    run_to_end(TrainerGroup(session, job))
    errors = [e["error"] for e in read_lines(session.run.events) if e["kind"] == "restart"]
    assert errors == ["boom", f"no step for more than 1200 s; {hangs} says where the ranks stood"]


def test_a_stop_that_a_lost_group_was_told_of_is_not_for_the_next(
    session, job, trainings, monkeypatch
):
    """A rank passes its own signal on by the stop file, and dies before it has saved."""
    made, seen = trainings([0, 6]), []
    once = made.fit

    def fit(job, ranks, name):
        seen.append(job.stop.exists())
        job.stop.touch()
        return once(job, ranks, name)

    monkeypatch.setattr(group.fit, "fit", fit)
    run_to_end(TrainerGroup(session, job))
    assert seen == [False, False] and session.stop_signal == 0


def test_an_error_that_would_only_repeat_ends_the_run_at_once(session, job, trainings):
    made = trainings([0])
    job.final.write_text('{"kind": "ConfigError", "message": "train.batch_size=7 ..."}')
    with pytest.raises(ConfigError, match=r"train\.batch_size=7"):
        run_to_end(TrainerGroup(session, job))
    assert made.starts == 1


def test_a_training_is_not_started_again_on_a_disk_that_takes_no_files(session, job, trainings):
    made = trainings([0])
    session.scratch = Path(__file__)  # no folder
    with pytest.raises(RunFailed, match=r"takes no files \(File exists\)"):
        run_to_end(TrainerGroup(session, job))
    assert made.starts == 1


# -----------------------------------------------------------------------------------------------
# Its size


def sized(tmp_path, num_workers, *settings):
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={tmp_path}",
            "train.batch_size=12",
            "cluster.address=there",
            f"cluster.trainer.num_workers={num_workers}",
            *settings,
        ]
    )
    return config


def node(alive=True, **resources):
    return {"Alive": alive, "Resources": {name: float(n) for name, n in resources.items()}}


def test_a_group_is_the_largest_that_fits_and_shares_the_batch(tmp_path):
    """A batch of 12 is shared by 1, 2, 3, 4, 6 and 12 ranks."""
    config = sized(tmp_path, "[2,8]", "cluster.trainer.cpus_per_worker=2")
    cluster, train = config.cluster, config.train
    assert cluster.trainer.sizes(train) == [2, 3, 4, 6]
    for nodes, size in (
        ([], 0),
        ([node(trainer=1, CPU=8)], 0),  # fewer than two
        ([node(trainer=8, CPU=7)], 3),
        ([node(trainer=3, CPU=8), node(trainer=2, CPU=8)], 4),
        ([node(trainer=3, CPU=8), node(False, trainer=2, CPU=8)], 3),
        ([node(trainer=9, CPU=99)], 6),
        ([node(CPU=99, teacher=9)], 0),  # a node of teachers
    ):
        assert group_size(cluster, train, nodes) == size
    cluster.trainer.gpus_per_worker = 0.5
    assert group_size(cluster, train, [node(trainer=8, CPU=99, GPU=1)]) == 2
    assert group_size(cluster, train, [node(trainer=8, CPU=99)]) == 0


def test_on_one_machine_ranks_leave_room_for_teachers(tmp_path):
    config = sized(tmp_path, "[1,8]", "cluster.address=", "cluster.teachers.num_workers=2")
    here = node(trainer=8, teacher=8, CPU=99, GPU=4)
    assert group_size(config.cluster, config.train, [here]) == 6
    config.cluster.trainer.gpus_per_worker = config.cluster.teachers.gpus_per_worker = 1.0
    assert group_size(config.cluster, config.train, [here]) == 2


def test_numbers_of_ranks_none_of_which_shares_the_batch_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"8 ranks .* cannot share train.batch_size=12 .*; 6 can"):
        sized(tmp_path, "[7,8]")
    with pytest.raises(ConfigError, match=r"num_workers=\[4, 2\] must be a number above 0, or two"):
        sized(tmp_path, "[4,2]")


def test_a_node_that_is_gone_does_not_answer():
    """Ray still counts it as alive for up to 15 s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = node(trainer=1) | {
            "NodeManagerAddress": "127.0.0.1",
            "NodeManagerPort": server.getsockname()[1],
        }
        assert silent_nodes([there]) == []
    assert silent_nodes([there]) == ["127.0.0.1"]
    assert silent_nodes([there | {"Alive": False}]) == []  # Ray places nothing there
    assert silent_nodes([there | {"Resources": {"teacher": 1.0}}]) == []


class Ranks:
    """Stands in for `fit`: ranks that train until they are asked to stop, or a node is lost."""

    def __init__(self, job, monkeypatch):
        self.job, self.sizes, self.lost, self.step = job, [], threading.Event(), 0
        monkeypatch.setattr(group.fit, "fit", self.fit)
        monkeypatch.setattr(group, "steps_done", lambda run: self.step)
        monkeypatch.setattr(group, "GROW_AFTER_S", 0.0)
        monkeypatch.setattr(group, "SETTLE_S", 0.0)

    def train(self):
        self.step += 1
        append_metrics(self.job.run, Metrics(self.step))

    def fit(self, job, ranks, name):
        self.sizes.append(ranks)
        while not job.stop.exists():
            if self.lost.is_set():
                self.lost.clear()
                raise RuntimeError("a node is gone")
            time.sleep(0.001)
        return self.step


@pytest.fixture
def elastic(session, tmp_path, monkeypatch):
    """A group of one or two ranks."""
    session.config = sized(tmp_path, "[1,2]")
    job = TrainJob("train", session.config, None, session.scratch, "hash")
    return TrainerGroup(session, job), Ranks(job, monkeypatch)


def poll_until(made, condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert not made.poll() and time.monotonic() < deadline
        time.sleep(0.001)


def test_a_group_shrinks_with_its_nodes_and_grows_again(elastic, session):
    made, ranks = elastic
    poll_until(made, lambda: ranks.sizes == [2])
    for _ in range(3):
        ranks.train()
    session.ranks = 1
    ranks.lost.set()
    poll_until(made, lambda: ranks.sizes == [2, 1])
    ranks.step = 0  # it goes on from a checkpoint
    session.ranks = 2
    for _ in range(20):
        made.poll()
    assert ranks.sizes == [2, 1]  # not before it has got further
    ranks.train()
    poll_until(made, lambda: ranks.sizes == [2, 1, 2])
    assert session.stop_signal == 0 and not made.job.stop.exists()
    groups = [e["ranks"] for e in read_lines(session.run.events) if e["kind"] == "group"]
    assert groups == [2, 1, 2]
    made.job.stop.touch()


def test_a_group_waits_for_nodes_and_is_given_up_after_a_while(elastic, session, monkeypatch):
    made, ranks = elastic
    session.ranks = 0
    for _ in range(3):
        assert not made.poll()
    assert made.note == "waits for nodes" and ranks.sizes == []
    assert [e["kind"] for e in read_lines(session.run.events)] == ["group_waits"]
    monkeypatch.setattr(group, "REJOIN_S", 0.0)
    with pytest.raises(RunFailed, match="no room for 1 trainer ranks"):
        made.poll()


def test_a_machine_that_is_too_small_is_not_waited_for(session, tmp_path):
    """No node joins a Ray that was started for this run alone."""
    session.config, session.ranks = sized(tmp_path, "[1,2]", "cluster.address="), 0
    job = TrainJob("train", session.config, None, session.scratch, "hash")
    with pytest.raises(ConfigError, match=r"no room for cluster\.trainer\.num_workers=1 ranks"):
        TrainerGroup(session, job).poll()


def test_a_group_waits_until_ray_knows_which_nodes_are_gone(elastic, session, monkeypatch):
    """Otherwise its ranks would be placed there, and Ray would wait for them."""
    made, ranks = elastic
    monkeypatch.setattr(group, "silent_nodes", lambda nodes: ["there"])
    for _ in range(3):
        assert not made.poll()
    assert ranks.sizes == []
    monkeypatch.setattr(group, "silent_nodes", lambda nodes: [])
    poll_until(made, lambda: ranks.sizes == [2])
    made.job.stop.touch()


def test_the_first_group_waits_for_the_last_of_its_nodes(elastic, session, monkeypatch):
    made, ranks = elastic
    monkeypatch.setattr(group, "SETTLE_S", 60.0)
    session.ranks = 1
    for _ in range(3):
        assert not made.poll()
    assert ranks.sizes == []
    session.ranks = 2
    poll_until(made, lambda: ranks.sizes == [2])
    made.job.stop.touch()
