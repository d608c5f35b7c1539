"""Ranks as threads of one process: what they find out together takes no process group to test."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch

TIMEOUT_S = 30.0  # a rank that is left alone fails, and does not hang


class ThreadRank:
    """One rank, as `distill.engine.engine.Peers` has it."""

    def __init__(self, rank: int, slots: list, barrier: Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self.background = self
        self._slots, self._barrier = slots, barrier

    def any(self, flag: bool) -> bool:
        return bool(self.gather(torch.tensor(flag)).any())

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        self._slots[self.rank] = values
        self._barrier.wait(TIMEOUT_S)
        found = torch.stack(self._slots)
        self._barrier.wait(TIMEOUT_S)  # before a slot is used again
        return found


def on_threads(world_size: int, worker: Callable[[ThreadRank], Any]) -> list[Future]:
    """What worker(rank) came to on each of `world_size` ranks."""
    slots, barrier = [None] * world_size, Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [ThreadRank(rank, slots, barrier) for rank in range(world_size)]
        return [pool.submit(worker, rank) for rank in ranks]


def results(world_size: int, worker: Callable[[ThreadRank], Any]) -> list:
    """Results of worker(rank), by rank."""
    return [future.result() for future in on_threads(world_size, worker)]


def errors(world_size: int, worker: Callable[[ThreadRank], Any]) -> list:
    """What worker(rank) raised, by rank; None where it did not."""
    return [future.exception() for future in on_threads(world_size, worker)]
