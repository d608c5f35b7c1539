"""A teacher worker as the pool sees it."""

import time
from dataclasses import dataclass
from math import inf
from typing import Any

from cluster.plan.placement import Device
from cluster.pool.messages import Place


@dataclass(eq=False)
class Member:
    """An actor as the pool sees it. `task` is what it does: it says who it is, loads its teachers,
    then makes shards. None when it is idle.
    """

    actor: Any
    device: Device  # where it computes
    task: Any
    ping: Any  # pending question for its name and progress
    place: Place | None = None  # known once it has a process
    birth: str = ""  # the node of Ray that it came with
    is_parked: bool = False  # its place takes no work, and it keeps others from being put there
    name: str = ""  # known once it has a process, which may have to wait for a node
    shard: int | None = None
    samples: int = -1
    expires_s: float = inf  # its teachers must be loaded by then, or its shard be dropped
    leaves: bool = False  # it goes when its shard is done

    @property
    def is_loading(self) -> bool:
        """Whether its teachers are not loaded yet."""
        return self.task is not None and self.shard is None

    def is_at(self, place: Place) -> bool:
        """Whether it is on that GPU or node."""
        return self.place is not None and place in (self.place, self.place.whole)

    def hear(self, name: str, samples: int, expires_s: float) -> bool:
        """Whether it got further; the first time also until when its teachers must be loaded."""
        if not self.name:
            self.name, self.expires_s = name, expires_s
        further, self.samples = samples != self.samples, samples
        return further


def choose_leaving(members: list[Member], wanted: dict[Device, int]) -> list[Device]:
    """Devices of the members that are missing, after those that are too many were told to leave.

    The idle ones go first. Who was told to leave and is still at work stays when it is wanted.
    """
    missing: list[Device] = []
    for device, target in wanted.items():
        there = [m for m in members if m.device == device and not m.is_parked]
        missing += [device] * _choose_leaving(there, target)
    return missing


def _choose_leaving(members: list[Member], target: int) -> int:
    staying = [member for member in members if not member.leaves]
    staying.sort(key=lambda member: member.shard is None)
    for member in staying[target:]:
        member.leaves = True
    missing = target - len(staying)
    for member in [m for m in members if m.leaves and m.shard is not None]:
        if missing > 0:
            member.leaves, missing = False, missing - 1
    return missing


PARTS_OF_TIME = 10  # waiting for a disk or a network: a tenth of the time
PARTS_OF_CORE = 50  # computing: a fiftieth of a core


class Pace:
    """`is_due`, then the work, then `done`."""

    def __init__(self) -> None:
        self._next_s = self._began_s = self._began_cpu_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """Whether it shall be done now; if so, it counts from here."""
        self._began_s, self._began_cpu_s = now_s, time.thread_time()
        return now_s >= self._next_s

    def done(self, period_s: float) -> None:
        """It is done; the next time comes in `period_s` at least, counted from its beginning."""
        wall = time.monotonic() - self._began_s
        core = time.thread_time() - self._began_cpu_s
        self._next_s = self._began_s + max(period_s, PARTS_OF_TIME * wall, PARTS_OF_CORE * core)
