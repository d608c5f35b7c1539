"""A rank that hangs: stacks of all ranks, and the end of the group."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster import watchdog
from cluster.watchdog import ending_when_hung, has_hung
from distill.testing import run_ranks


def stands_still() -> None:
    threading.Event().wait()


def hanging_rank(rank: int, world_size: int, folder: str) -> None:
    """Rank 1 never comes to the third step, and rank 0 waits for it."""
    watchdog.GRACE_S, watchdog.POLL_PERIOD_S = 3.0, 0.1
    with ending_when_hung(Path(folder) / f"rank_{rank:05d}.txt", 2.0) as beat:
        for step in range(3):
            beat(0.0)
            if (rank, step) == (1, 2):
                stands_still()
            dist.all_reduce(torch.ones(1))


def test_all_ranks_say_where_they_stand_and_end(tmp_path):
    hangs, started = tmp_path / "hangs", time.time()
    with pytest.raises(AssertionError, match=r"exit codes \[(1|-15), (1|-15)\]"):
        run_ranks(hanging_rank, 2, tmp_path / "ranks", str(hangs))
    waits, hung = ((hangs / f"rank_0000{rank}.txt").read_text() for rank in (0, 1))
    assert "no step for more than 2 s" in waits and "in all_reduce" in waits
    assert "in stands_still" in hung and "in hanging_rank" in hung
    assert has_hung(hangs, started) and not has_hung(hangs, time.time())


def test_steps_keep_a_rank_alive_and_leave_nothing(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(watchdog, "POLL_PERIOD_S", 0.01)
    with ending_when_hung(tmp_path / "hangs/rank_00000.txt", 0.5) as beat:
        for _ in range(10):
            time.sleep(0.1)
            beat(0.0)
        beat(0.6)  # a wait for data
        time.sleep(0.7)
        beat(0.0)
    assert ended == [] and not (tmp_path / "hangs").exists()
    with ending_when_hung(tmp_path / "hangs/rank_00000.txt", 0.1):
        time.sleep(0.5)
    assert ended == [1]


def test_a_disk_without_room_keeps_no_rank_alive(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(watchdog, "POLL_PERIOD_S", 0.01)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    (tmp_path / "hangs").touch()  # no folder can be made
    with ending_when_hung(tmp_path / "hangs/rank_00000.txt", 0.1):
        time.sleep(0.5)
    assert ended == [1]
