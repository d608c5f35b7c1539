"""A cluster in simulated time around the real coordinator: nodes that go, workers, a trainer.

Real are `cluster.pool.coordinator` (leases, heartbeats, expiry, back-pressure) and
`distill.data.order` (which ids a step reads). Simulated are time, nodes, the time a shard takes,
the disk and the step. The messages are those that `cluster.pool.pool` sends: a heartbeat of every
busy worker four times in a lease, results when they are there, the trainer's position when it
moves, and a tick once a second. The pool itself looks at position and clock ten times a second.
What the pool does of its own is done here too: it replaces a worker that failed, and parks it where
nothing is to be made.
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
    Arrived,
    Asked,
    Committed,
    CursorMoved,
    Event,
    Excluded,
    Expired,
    Failed,
    Gone,
    Heartbeat,
    Joined,
    Leased,
    Left,
    Place,
    Readmitted,
    Superseded,
    Tick,
    Unfit,
)
from distill.data.order import Order

TICK_S = 1.0
HEARTBEATS_PER_LEASE = 4  # as in cluster.pool
FIRST_S, SLOWER = 1.0, 10.0  # until the first evaluation; a slow GPU


@dataclass
class Node:
    """A machine, from when it comes until it is taken."""

    number: int
    birth: str
    is_up: bool = True
    workers: list[Worker] = field(default_factory=list)


@dataclass
class Worker:
    """A teacher worker. `shard` is what it makes, since `since_s`."""

    name: str
    node: Node
    gpu: int
    sickness: str = ""
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
    excluded: set[Place] = field(default_factory=set)

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
            gpus = min(chosen.per_node, chosen.teachers - first)
            self._node_up(first // chosen.per_node, gpus)
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
        longest wait is of one step; `excluded` counts GPUs.
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
            "excluded": len([place for place in self.excluded if place.gpu]),
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
                case Expired(name, _):
                    self.expiries += 1
                    if name in self.workers:
                        self._replace(self.workers[name])
                case Superseded(name, _):
                    if name in self.workers:
                        self._stop(self.workers[name])
                case Excluded(place):
                    self.excluded.add(place)
                    self._end_all_at(place)
                case Readmitted(place):
                    self.excluded.discard(place)
                case _:  # a real run would stop here, too
                    raise RuntimeError(f"the run ends: {action}")

    def _tick(self) -> None:
        self._tell(Tick())
        if self.first_step_s <= self.now:
            self._backlogs.append(len(self.disk) - self.coordinator.cursor)
        self._at(self.now + TICK_S, self._tick)

    def _heartbeats(self) -> None:
        for worker in list(self.workers.values()):
            if worker.shard is not None and worker.sickness != "hangs":
                self._tell(Heartbeat(worker.name))
        period = self.settings.lease_timeout_s / HEARTBEATS_PER_LEASE
        self._at(self.now + period, self._heartbeats)

    # ---------------------------------------------------------------------------------------
    # Nodes and workers

    def _node_up(self, number: int, gpus: int) -> None:
        self._count += 1
        node = Node(number, f"{number}-{self._count}")
        for gpu in range(gpus):
            self._start(node, gpu)
        if self.settings.per_hour > 0:
            life_s = self._random.expovariate(self.settings.per_hour / 3600)
            take = self._notice if self.settings.way == "drained" else self._take
            self._at(self.now + life_s, take, node)

    def _sickness(self, node: Node, gpu: int) -> str:
        """The first nodes have a sick GPU each."""
        kind = node.number // self.settings.each_sick
        return self.settings.sick[kind] if gpu == 0 and kind < len(self.settings.sick) else ""

    def _start(self, node: Node, gpu: int) -> None:
        """A worker comes, with its teachers loaded; or it is parked, or fails to load them."""
        if not node.is_up:
            return
        self._count += 1
        worker = Worker(f"w{self._count}", node, gpu, self._sickness(node, gpu))
        self.workers[worker.name] = worker
        node.workers.append(worker)
        place = self._place(worker)
        self._tell(Arrived(worker.name, place, "gpu", node.birth))
        if not self.coordinator.health.takes_work(place):
            return
        if worker.sickness == "load":
            self._tell(Unfit(place, node.birth, "CUDA error: uncorrectable ECC error"))
            self._replace(worker)
        else:
            self._tell(Joined(worker.name))
            self._tell(Asked(worker.name))

    def _place(self, worker: Worker) -> Place:
        return Place(f"n{worker.node.number}", f"{worker.gpu}")

    def _replace(self, worker: Worker) -> None:
        """It is ended, and another one started where it was."""
        if not worker.is_up:
            return
        if worker.shard is not None:
            self.lost_s += self.now - worker.since_s
        self._vanish(worker)
        worker.node.workers.remove(worker)
        self._tell(Left(worker.name, "replaced"))
        self._at(self.now + self.settings.restart_s, self._start, worker.node, worker.gpu)

    def _stop(self, worker: Worker) -> None:
        """Another one has made its shard."""
        self.lost_s += self.now - worker.since_s
        worker.shard = None
        if worker.leaves:
            self._leave(worker)
        elif worker.sickness == "hangs":
            self._at(self.now + self.settings.lease_timeout_s, self._give_up, worker)
        else:
            self._tell(Asked(worker.name))

    def _give_up(self, worker: Worker) -> None:
        """It has not even stopped."""
        if worker.is_up:
            self._tell(Unfit(self._place(worker), worker.node.birth, "does not answer"))
            self._replace(worker)

    def _end_all_at(self, place: Place) -> None:
        for worker in list(self.workers.values()):
            if place in (self._place(worker), self._place(worker).whole):
                self._replace(worker)

    def _notice(self, node: Node) -> None:
        """Those that have no shard leave now, the others with their shard or at the end."""
        for worker in list(node.workers):
            worker.leaves = True
            if worker.shard is None:
                self._leave(worker)
        self._at(self.now + self.settings.notice_s, self._take, node)

    def _take(self, node: Node) -> None:
        """The node goes, with all that its workers had in hand."""
        chosen, node.is_up = self.settings, False
        gpus = min(chosen.per_node, chosen.teachers - node.number * chosen.per_node)
        self.taken += gpus
        for worker in [worker for worker in node.workers if worker.is_up]:
            if worker.shard is not None:
                self.lost_s += self.now - worker.since_s
            self._vanish(worker)
            if chosen.way == "drained":
                self._tell(Left(worker.name, "drained", is_alone=False))
            elif chosen.way == "killed":
                left = Left(worker.name, "node lost", is_alone=False)
                self._at(self.now + chosen.detect_s, self._tell, left)
        self._at(self.now + chosen.detect_s, self._tell, Gone(node.birth))
        away_s = self._random.lognormvariate(math.log(chosen.rejoin_s), chosen.rejoin_spread)
        self._at(self.now + away_s, self._node_up, node.number, gpus)

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
        if worker.gpu < chosen.slow_gpus:
            takes_s *= chosen.slower
        worker.shard, worker.since_s = shard, self.now
        match worker.sickness:
            case "hangs":
                return
            case "slow":
                takes_s *= SLOWER
            case "first":
                takes_s = FIRST_S
            case "dies":
                takes_s *= self._random.random()
        self._at(self.now + takes_s, self._end_shard, worker, shard, self.now)

    def _end_shard(self, worker: Worker, shard: int, since_s: float) -> None:
        """It is made, or has failed; not where the worker was ended in the meantime."""
        if not worker.is_up or worker.shard != shard or worker.since_s != since_s:
            return
        place, birth = self._place(worker), worker.node.birth
        match worker.sickness:
            case "first":
                self._tell(Failed(worker.name, "CUDA error: an illegal memory access"))
            case "nan":
                self._tell(Failed(worker.name, "values that are not finite", is_refusal=True))
            case "dies":
                self._tell(Unfit(place, birth, "a teacher worker died"))
            case _:
                self._commit(worker)
                return
        self._replace(worker)

    def _commit(self, worker: Worker) -> None:
        shard, worker.shard = worker.shard, None
        assert shard is not None and shard not in self.disk
        self.disk.add(shard)
        self.made_s += self.now - worker.since_s
        self._tell(Committed(shard, 1, worker.name))
        if worker.leaves:
            self._leave(worker)
        elif worker.is_up:
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
