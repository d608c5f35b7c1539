"""A cluster in simulated time around the real coordinator: nodes that go, workers, a trainer.

Real are `cluster.pool.coordinator` (leases, heartbeats, expiry, back-pressure) and
`distill.data.order` (which ids a step reads). Simulated are time, nodes, the time a shard takes,
the disk and the step. The messages are those that `cluster.pool.pool` sends: a heartbeat of every
busy worker four times in a lease, results when they are there, the trainer's position when it
moves, and a tick once a second. The pool itself looks at position and clock ten times a second.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.stream.world_settings import WAYS, Settings
from cluster.pool.coordinator import Coordinator, Limits
from cluster.pool.messages import (
    Asked,
    Committed,
    CursorMoved,
    Event,
    Expired,
    Heartbeat,
    Joined,
    Leased,
    Left,
    Tick,
)
from distill.data.order import Order

TICK_S = 1.0
HEARTBEATS_PER_LEASE = 4  # as in cluster.pool


@dataclass
class Worker:
    """A teacher worker. `shard` is what it makes, since `since_s`."""

    name: str
    is_up: bool = True
    leaves: bool = False
    shard: int | None = None
    since_s: float = 0.0


@dataclass
class World:
    """The simulation of one `Settings`; `run` gives what came out."""

    settings: Settings
    now: float = 0.0
    disk: set[int] = field(default_factory=set)
    step: int = 0
    first_step_s: float = math.inf
    useful_s: float = 0.0
    lost_s: float = 0.0  # work on shards that came to nothing
    made_s: float = 0.0  # work on shards that were committed
    up_s: float = 0.0
    longest_wait_s: float = 0.0  # of the trainer, once it has begun
    expiries: int = 0
    taken: int = 0  # workers

    def __post_init__(self) -> None:
        chosen = self.settings
        assert chosen.way in WAYS
        self._random = random.Random(chosen.seed)
        samples = chosen.block_shards * chosen.samples_per_shard
        self.order = Order(
            chosen.seed, samples, chosen.passes, chosen.batch_size, chosen.block_spread
        )
        self.first_step, self.num_steps = (self._step_of(n) for n in (chosen.first, chosen.last))
        self.reads = np.zeros(chosen.shards * chosen.samples_per_shard, dtype=np.int64)
        self.coordinator = Coordinator(
            Limits(
                num_shards=chosen.shards,
                block_shards=chosen.block_shards,
                ready_ahead=chosen.ready_ahead,
                max_bytes=chosen.shards,
                shard_bytes=1,
                lease_timeout_s=chosen.lease_timeout_s,
                max_attempts=chosen.max_attempts,
            ),
            committed={},
        )
        self.workers: dict[str, Worker] = {}  # that are up
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._missing: set[int] = set()  # what the next step waits for
        self._waits_since_s = 0.0
        self._backlogs: list[int] = []

    def run(self) -> dict[str, float]:
        """Lives until the last step is done; see `summary`."""
        chosen = self.settings
        for first in range(0, chosen.teachers, chosen.per_node):
            self._node_up(min(chosen.per_node, chosen.teachers - first))
        self._at(0.0, self._tick)
        self._at(0.0, self._heartbeats)
        self._begin_step()
        while self.step < self.num_steps:
            now, _, action, values = heapq.heappop(self._agenda)
            self.up_s += (now - self.now) * len(self.workers)
            self.now = now
            action(*values)
        return self.summary()

    def summary(self) -> dict[str, float]:
        """What the run came to, once every id was read as often as planned, and no other.

        Goodput is the time of steps over the time from `first` to `last`; `teachers_up` the mean
        share of the workers that were there; `wasted` the share of the teachers' evaluations that
        came to nothing; the backlog counts shards on disk that the trainer has not begun; the
        longest wait is of one step.
        """
        passes, per_shard = self.settings.passes, self.settings.samples_per_shard
        begun = self.settings.last * per_shard
        read = self.order.oldest_block(self.num_steps) * self.order.block_samples
        assert (self.reads[:read] == passes).all() and not self.reads[begun:].any()
        hours = self.now / 3600
        return {
            "hours": hours,
            "goodput": self.useful_s / (self.now - self.first_step_s),
            "teachers_up": self.up_s / self.now / self.settings.teachers,
            "backlog": float(np.mean(self._backlogs)),
            "longest_wait_s": self.longest_wait_s,
            "wasted": self.lost_s / (self.lost_s + self.made_s),
            "expiries_per_hour": self.expiries / hours,
            "taken_per_hour": self.taken / hours,
        }

    def _step_of(self, shards: int) -> int:
        """The number of steps that read none but the first `shards` shards."""
        block, rest = divmod(shards, self.settings.block_shards)
        assert rest == 0
        return bisect_right(range(10**9), block, key=self.order.num_blocks) - 1

    # ---------------------------------------------------------------------------------------
    # Time and the coordinator

    def _at(self, now: float, action: Callable[..., None], *values: Any) -> None:
        self._count += 1  # events of the same time stay in order
        heapq.heappush(self._agenda, (now, self._count, action, values))

    def _tell(self, event: Event) -> None:
        for action in self.coordinator.handle(event, self.now):
            match action:
                case Leased(name, shard):
                    self._work(name, shard)
                case Expired():
                    self.expiries += 1
                case _:  # a real run would stop here, too
                    raise RuntimeError(f"shard given up: {action}")

    def _tick(self) -> None:
        self._tell(Tick())
        if self.first_step_s <= self.now:
            self._backlogs.append(len(self.disk) - self.coordinator.cursor)
        self._at(self.now + TICK_S, self._tick)

    def _heartbeats(self) -> None:
        for worker in self.workers.values():
            if worker.shard is not None:
                self._tell(Heartbeat(worker.name))
        period = self.settings.lease_timeout_s / HEARTBEATS_PER_LEASE
        self._at(self.now + period, self._heartbeats)

    # ---------------------------------------------------------------------------------------
    # Nodes and workers

    def _node_up(self, num_workers: int) -> None:
        node = []
        for _ in range(num_workers):
            self._count += 1
            worker = Worker(f"w{self._count}")
            self.workers[worker.name] = worker
            node.append(worker)
            self._tell(Joined(worker.name))
            self._tell(Asked(worker.name))
        if self.settings.per_hour > 0:
            life_s = self._random.expovariate(self.settings.per_hour / 3600)
            take = self._notice if self.settings.way == "drained" else self._take
            self._at(self.now + life_s, take, node)

    def _notice(self, node: list[Worker]) -> None:
        """Those that have no shard leave now, the others with their shard or at the end."""
        for worker in node:
            worker.leaves = True
            if worker.shard is None:
                self._leave(worker)
        self._at(self.now + self.settings.notice_s, self._take, node)

    def _take(self, node: list[Worker]) -> None:
        """The node goes, with all that its workers had in hand."""
        chosen = self.settings
        self.taken += len(node)
        for worker in [worker for worker in node if worker.is_up]:
            if worker.shard is not None:
                self.lost_s += self.now - worker.since_s
            self._vanish(worker)
            if chosen.way == "drained":
                self._tell(Left(worker.name, "drained"))
            elif chosen.way == "killed":
                self._at(self.now + chosen.detect_s, self._tell, Left(worker.name, "node lost"))
        away_s = self._random.lognormvariate(math.log(chosen.rejoin_s), chosen.rejoin_spread)
        self._at(self.now + away_s, self._node_up, len(node))

    def _leave(self, worker: Worker) -> None:
        self._vanish(worker)
        self._tell(Left(worker.name, "drained"))

    def _vanish(self, worker: Worker) -> None:
        worker.is_up = False
        del self.workers[worker.name]

    def _work(self, name: str, shard: int) -> None:
        """A lease came; nobody hears it on a node that is gone."""
        worker = self.workers.get(name)
        if worker is None:
            return
        chosen, sigma = self.settings, self.settings.spread
        takes_s = self._random.lognormvariate(math.log(chosen.shard_s) - sigma**2 / 2, sigma)
        worker.shard, worker.since_s = shard, self.now
        self._at(self.now + takes_s, self._commit, worker)

    def _commit(self, worker: Worker) -> None:
        if not worker.is_up:
            return
        shard, worker.shard = worker.shard, None
        assert shard is not None and shard not in self.disk
        self.disk.add(shard)
        self.made_s += self.now - worker.since_s
        self._tell(Committed(shard, 1))
        if worker.leaves:
            self._leave(worker)
        else:
            self._tell(Asked(worker.name))
        if shard in self._missing:
            self._missing.remove(shard)
            self._read_if_there()

    # ---------------------------------------------------------------------------------------
    # The trainer

    def _begin_step(self) -> None:
        self._waits_since_s = self.now
        blocks, size = self.order.blocks_of(self.step), self.settings.block_shards
        cursor = self.order.newest_block(self.step) * size
        if cursor != self.coordinator.cursor:
            self._tell(CursorMoved(cursor))
        wanted = range(blocks[0] * size, (blocks[-1] + 1) * size)
        self._missing = {shard for shard in wanted if shard not in self.disk}
        self._read_if_there()

    def _read_if_there(self) -> None:
        if self._missing:
            return
        if self.step > self.first_step:
            self.longest_wait_s = max(self.longest_wait_s, self.now - self._waits_since_s)
        if self.step >= self.first_step:
            self.first_step_s = min(self.first_step_s, self.now)
        ids, _ = self.order.entries(self.step)
        np.add.at(self.reads, ids, 1)
        self._at(self.now + self.settings.step_s, self._end_step)

    def _end_step(self) -> None:
        self.useful_s += self.settings.step_s * (self.step >= self.first_step)
        self.step += 1
        if self.step < self.num_steps:
            self._begin_step()
