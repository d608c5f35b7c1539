"""A group of ranks: what ends it, how a stop reaches all of it, and that there is one at a time."""

import os
import subprocess
import sys
import time

import pytest
import torch
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo
from small_training import config_of, fit_all, read_share, single_engine, zero_engine

from cluster.trainer import rank
from cluster.trainer.fit import NEVER_AGAIN, final_error, is_told_to_stop, stop_signal, train_rank
from cluster.trainer.rank import _only_trainer
from distill.checkpoint.manifest import CheckpointError, SaveError, committed_steps
from distill.config import ConfigError
from distill.engine.engine import TorchEngine
from distill.objectives.build import build_objective
from distill.objectives.config import ReflowConfig
from distill.run.files import RunDir, read_lines
from distill.testing import run_ranks


@pytest.mark.parametrize(
    "error",
    [
        ControllerError(WorkerGroupStartupTimeoutError(2)),  # a node died while its ranks started
        WorkerGroupError("a rank died", {0: RuntimeError("boom")}),
        PreemptionError(PreemptionInfo(None, {"a node": [1]})),
    ],
    ids=lambda error: type(error).__name__,
)
def test_ray_starts_no_group_again_by_itself(error):
    """Left to Ray it would, for ever, and at the size of before."""
    assert DefaultFailurePolicy(NEVER_AGAIN).make_decision(error) is FailureDecision.RAISE


def test_a_signal_to_one_rank_reaches_those_that_wait(job):
    assert not is_told_to_stop(job)
    stop_signal.set()
    try:
        assert is_told_to_stop(job)
    finally:
        stop_signal.clear()
    assert is_told_to_stop(job)  # as the others see it


@pytest.fixture
def fail(job, monkeypatch):
    """error -> the final one that a rank leaves behind when it raises that."""
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))

    def leave(error):
        def raise_it(*args):
            raise error

        monkeypatch.setattr(rank, "run_rank", raise_it)
        with pytest.raises(type(error), match=str(error)):
            train_rank({"job": job})
        return final_error(job)

    return leave


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError])
def test_what_a_restart_would_only_repeat_is_left_behind(fail, kind):
    found = fail(kind("no checkpoint can be opened"))
    assert type(found) is kind and str(found) == "no checkpoint can be opened"


def test_a_save_that_failed_lets_the_ranks_start_again(fail):
    assert fail(SaveError("rank 1 could not write step 4: Input/output error")) is None


# -----------------------------------------------------------------------------------------------
# A stop while data are waited for


def waiting_rank(rank: int, world_size: int, root: str) -> int:
    """Rank 1 is told to stop while it waits for step 3, whose data rank 0 has."""
    config = config_of(max_steps=10, save_every=100, zero_stage=1)
    engine = zero_engine(config)
    return fit_all(
        engine,
        lambda step: None if (rank, step) == (1, 3) else read_share(step, rank, world_size),
        build_objective(ReflowConfig(), 0),
        config,
        root,
    )


def test_ranks_agree_on_a_stop_that_one_of_them_saw(tmp_path):
    assert run_ranks(waiting_rank, 2, tmp_path / "ranks", str(tmp_path / "run")) == [3, 3]
    run = RunDir(tmp_path / "run")
    assert list(committed_steps(run.checkpoints)) == [3]
    windows = [(e["first"], e["last"]) for e in read_lines(run.events) if e["kind"] == "steps"]
    assert windows[-1][1] == 2  # the steps before it are on record


# -----------------------------------------------------------------------------------------------
# One group at a time

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def other_group(tmp_path):
    """(seconds) -> a process that holds the run's lock of ranks for so long."""
    held = []

    def hold(seconds):
        lock = RunDir(tmp_path).trainer_lock
        command = [sys.executable, "-c", HOLD, str(lock), str(seconds)]
        held.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert held[-1].stdout.readline() == b"held\n"
        return held[-1]

    yield hold
    for process in held:
        process.kill()
        process.wait()


def engine() -> TorchEngine:
    return single_engine(config_of())


def test_a_second_group_waits_for_the_ranks_of_the_first(tmp_path, other_group):
    started = time.monotonic()
    other_group(1.5)
    with _only_trainer(RunDir(tmp_path), engine()):
        assert time.monotonic() - started >= 1.5


def test_a_second_group_says_what_it_waited_for(tmp_path, other_group, monkeypatch):
    monkeypatch.setattr(rank, "LOCK_TIMEOUT_S", 0.3)
    process = other_group(60)
    words = rf"ranks of an earlier start have held {RunDir(tmp_path).trainer_lock} for 0\.3 s"
    with pytest.raises(RuntimeError, match=words), _only_trainer(RunDir(tmp_path), engine()):
        pass
    os.kill(process.pid, 9)  # as a node that is gone
    started = time.monotonic()
    with _only_trainer(RunDir(tmp_path), engine()):
        assert time.monotonic() - started < 5
