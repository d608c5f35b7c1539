"""Stop signals in ranks: real processes, real training, no Ray."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from ray.train.torch.config import _TorchBackend
from small_training import EVERY_TERM, config_of, fit, manifest, zero_engine

from cluster.trainer import meeting
from cluster.trainer.fit import (
    RANK_STOP_SIGNALS,
    RankConfig,
    catch_stop_signals,
    keep_words,
    set_timeout,
    stop_signal,
)
from distill.checkpoint.manifest import latest_verified
from distill.objectives.build import build_objective
from distill.run.files import RunDir
from distill.testing import run_ranks

MAX_STEPS = 50  # far beyond what a stop should take


class Signalling:
    """The usual loss; at step 2 it sends a signal to a process, once."""

    def __init__(self, pid: int, number: int) -> None:
        self.inner, self.pid, self.number = build_objective(EVERY_TERM, 0), pid, number

    def loss(self, batch, student, target, step):
        if step == 2 and self.pid:
            os.kill(self.pid, self.number)
            self.pid = 0
        return self.inner.loss(batch, student, target, step)


def stopped_rank(rank: int, world_size: int, root: str, number: int) -> tuple[int, bool]:
    """Steps done, and whether this rank had the signal, which rank 0 sends to rank 1."""
    catch_stop_signals()
    config = config_of(max_steps=MAX_STEPS, save_every=MAX_STEPS)
    engine = zero_engine(config)
    pids = engine.gather(torch.tensor(os.getpid())).tolist()
    objective = Signalling(pids[1] if rank == 0 else 0, number)
    done = fit(engine, root, config, objective, is_asked=stop_signal.is_set)
    return done, stop_signal.is_set()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1))
def test_a_signal_to_one_rank_makes_all_save_the_same_step_and_end(tmp_path, number):
    """`run_ranks` asserts that both end with code 0; the step is the signal's, or the next."""
    ranks = run_ranks(stopped_rank, 2, tmp_path / "ranks", str(tmp_path), int(number))
    (done, other), (same, had) = ranks
    assert (other, had) == (False, True)
    assert done == same and done in (3, 4)
    assert latest_verified(RunDir(tmp_path).checkpoints)[0] == done
    assert len(manifest(tmp_path, done).files) == 2  # of each rank


def wait_for_ever(ready) -> None:
    ready.set()
    time.sleep(60)


def forking_rank(rank: int, world_size: int) -> list[tuple[int, bool]]:
    """By signal and thread: how a forked child ends, and whether the rank takes it for its own."""
    catch_stop_signals()
    found, context = [], multiprocessing.get_context("fork")

    def fork(number: int) -> None:
        ready = context.Event()
        child = context.Process(target=wait_for_ever, args=(ready,))
        child.start()
        assert ready.wait(10)
        os.kill(child.pid, number)
        child.join(10)
        found.append((child.exitcode, stop_signal.is_set()))
        child.kill()

    for number in RANK_STOP_SIGNALS:
        fork(number)
        # Ray Train runs a rank beside the main thread, and so its loader.
        thread = threading.Thread(target=fork, args=(number,))
        thread.start()
        thread.join()
    os.kill(os.getpid(), signal.SIGTERM)  # the rank's own handler is still there
    return [*found, (0, stop_signal.is_set())]


def test_a_forked_child_ends_by_the_signal_and_the_training_goes_on(tmp_path):
    (found,) = run_ranks(forking_rank, 1, tmp_path / "ranks")
    ended = [(-number, False) for number in RANK_STOP_SIGNALS for _ in range(2)]
    assert found == [*ended, (0, True)]


def test_ray_train_has_every_rank_catch_them(tmp_path, monkeypatch):
    """After the ranks have met, in the main thread of each; before the start of the process group
    what a rank prints goes to a file, so that the words of the start are there.
    """
    calls: list = []
    monkeypatch.setattr(_TorchBackend, "on_start", lambda *_: calls.append("process group"))

    class Answer:
        def future(self):
            found = Future()
            found.set_result("here")
            return found

    class Group:
        def __len__(self):
            return 2

        def execute(self, work, *_):
            calls.append(work)

        def execute_single_async(self, rank, work, *_):
            calls.append((work, rank))
            return Answer()

    config = RankConfig(run=RunDir(tmp_path))
    config.backend_cls().on_start(Group(), config)
    kept, alone, together = (
        [(work, rank) for rank in range(2)]
        for work in (keep_words, meeting.compute, meeting.add_up)
    )
    assert calls == [*kept, "process group", *alone, *together, set_timeout, catch_stop_signals]
