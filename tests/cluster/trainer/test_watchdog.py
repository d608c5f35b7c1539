"""A rank that hangs: stacks of all ranks, and the end of the group."""

import ctypes
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.trainer import watchdog
from cluster.trainer.watchdog import ending_when_hung, stacks_bytes
from distill.testing import run_ranks


def stands_still() -> None:
    threading.Event().wait()


def holds_the_lock() -> None:
    """Sleeps in C without giving Python's lock away, so no other thread of Python runs."""
    ctypes.PyDLL(None).sleep(600)


def hanging_rank(rank: int, world_size: int, folder: str, how: str) -> None:
    """Rank 1 never comes to the third step, and rank 0 waits for it."""
    watchdog.GRACE_S, watchdog.POLL_PERIOD_S = 4.0, 0.1
    with ending_when_hung(Path(folder) / f"rank_{rank:05d}.txt", 2.0) as beat:
        for step in range(3):
            beat()
            if (rank, step) == (1, 2):
                {"stands_still": stands_still, "holds_the_lock": holds_the_lock}[how]()
            dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("how", ["stands_still", "holds_the_lock"])
def test_all_ranks_say_where_they_stand_and_end(tmp_path, how):
    hangs = tmp_path / "hangs"
    with pytest.raises(AssertionError, match=r"exit codes \[(1|-15), (1|-15)\]"):
        run_ranks(hanging_rank, 2, tmp_path / "ranks", str(hangs), how)
    waits, hung = ((hangs / f"rank_0000{rank}.txt").read_text() for rank in (0, 1))
    assert "no step for more than 2 s" in waits and "in all_reduce" in waits
    assert f"in {how}" in hung and "in hanging_rank" in hung
    assert ("no step for more than 2 s" in hung) == (how == "stands_still")
    assert stacks_bytes(hangs) == len(waits.encode()) + len(hung.encode())


def test_steps_keep_a_rank_alive_and_leave_nothing(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "GRACE_S", 1.0)
    monkeypatch.setattr(watchdog, "POLL_PERIOD_S", 0.01)
    with ending_when_hung(tmp_path / "hangs/rank_00000.txt", 0.5) as beat:
        for _ in range(10):
            time.sleep(0.1)
            beat()
        assert stacks_bytes(tmp_path / "hangs") == 0
    assert ended == [] and not (tmp_path / "hangs").exists()
    with ending_when_hung(tmp_path / "hangs/rank_00000.txt", 0.1):
        time.sleep(1.5)
    assert ended == [1]


def rank_without_room(rank: int, world_size: int, folder: str) -> None:
    watchdog.GRACE_S, watchdog.POLL_PERIOD_S = 1.0, 0.1
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with ending_when_hung(Path(folder) / "rank_00000.txt", 0.5):
        stands_still()


def test_a_disk_without_room_keeps_no_rank_alive(tmp_path):
    with pytest.raises(AssertionError, match=r"exit codes \[1\]"):
        run_ranks(rank_without_room, 1, tmp_path / "ranks", str(tmp_path / "hangs"))
    assert stacks_bytes(tmp_path / "hangs") == 0
