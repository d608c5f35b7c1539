"""Random schedules over coordinator, a simulated directory, workers and a trainer.

Whatever joins, leaves, dies, hangs, comes back late, rots or restarts: the trainer consumes exactly
the planned (id, pass) pairs in their order, nothing stops for ever, the window and the room on disk
are kept, and nothing that a kept checkpoint would read is deleted.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from cluster.pool.coordinator import Coordinator, Limits
from cluster.pool.messages import (
    Arrived,
    Asked,
    Committed,
    CursorMoved,
    Evicted,
    Expired,
    Failed,
    GivenUp,
    Heartbeat,
    Joined,
    Leased,
    Left,
    Place,
    Quarantined,
    Released,
    Superseded,
    Tick,
)
from cluster.state.evicted import first_shard_read
from cluster.state.room import room_for_training
from distill.config import TrainConfig
from distill.data.config import TrajectoryConfig
from distill.data.order import Order

SHARD_BYTES, LEASE_S = 100, 10.0
FAULTY_TICKS, MOST_TICKS = 60, 3_000
FAULTS = (
    "bad shard",
    "clock jumped",
    "coordinator lost",
    "failed",
    "hung",
    "killed",
    "killed before its report",
    "killed while evicting",
    "lost heartbeat",
    "newest checkpoint damaged",
    "scaled",
    "slow worker",
    "trainer killed",
)


class Killed(Exception):
    """The coordinator's process died in the middle of an action."""


@dataclass
class Worker:
    """A producer. `believed_in` is whether the coordinator of now counts it."""

    name: str
    speed: float  # part of a shard made in a second
    shard: int | None = None
    part: float = 0.0
    believed_in: bool = True


@dataclass
class Schedule:
    """One random world."""

    seed: int
    consumed: dict[int, tuple] = field(default_factory=dict)  # step -> (ids, passes)
    disk: dict[int, int] = field(default_factory=dict)
    record: set[int] = field(default_factory=set)  # evicted.json
    strays: set[int] = field(default_factory=set)  # made without a lease, by the believed dead
    seen: set[str] = field(default_factory=set)  # kinds of faults that struck

    def __post_init__(self):
        self.rng = rng = random.Random(self.seed)
        self.per_shard = rng.randint(1, 3)
        block_shards, batch = rng.randint(1, 3), rng.randint(1, 8)
        per_block = self.per_shard * block_shards
        passes, spread = rng.randint(1, 4), rng.choice([1, 1, 2, 3, 5])
        self.order = Order(rng.randrange(99), per_block, passes, batch, spread)
        self.train = TrainConfig(
            batch_size=batch,
            max_steps=rng.randint(5, 30),
            save_every=rng.randint(1, 6),
            keep_last=rng.randint(1, 3),
        )
        reach = self.order.most_ahead(batch) * block_shards
        trajectory = TrajectoryConfig(
            samples_per_shard=self.per_shard,
            block_shards=block_shards,
            passes=self.order.passes,
            ready_ahead=reach + rng.randint(0, 4),
        )
        shards = self.order.num_blocks(self.train.max_steps) * block_shards
        room = room_for_training(self.order, trajectory, self.train, shards, [])
        fit = room.shards + rng.choice([0, 0, 0, 1, 5, shards])  # mostly the least that may start
        self.limits = Limits(
            num_shards=shards,
            block_shards=block_shards,
            ready_ahead=trajectory.ready_ahead,
            max_bytes=fit * SHARD_BYTES,
            shard_bytes=SHARD_BYTES,
            lease_timeout_s=LEASE_S,
            max_attempts=10**6,
        )
        self.now, self.clock, self.num_names = 0.0, rng.uniform(-1e6, 1e6), 0
        self.workers: list[Worker] = []
        self.target = rng.randint(1, 4)
        self.step, self.kept, self.memory = 0, [], set()
        self.cursor = self.oldest_seen = 0
        self.rebuild()

    # ---------------------------------------------------------------------------------------
    # The coordinator and what carries its actions out

    def rebuild(self):
        """A new coordinator knows the directory and nothing else; its clock is another."""
        self.clock = self.rng.uniform(-1e6, 1e6)
        for worker in self.workers:
            worker.believed_in = False
        self.coordinator = Coordinator(
            self.limits, dict(self.disk), self.record - self.disk.keys(), cursor=self.cursor
        )

    def tell(self, event):
        for action in self.coordinator.handle(event, self.now + self.clock):
            match action:
                case Leased(name, shard):
                    self.lease(name, shard)
                case Superseded(name, shard):
                    worker = self.named(name)
                    assert worker.shard == shard and shard in self.disk
                    worker.shard = None
                    self.tell(Asked(name))
                case Expired(name, _):
                    self.named(name).believed_in = False  # it may go on and commit late
                case Evicted(shards):
                    self.evict(shards)
                case GivenUp():
                    raise AssertionError("no shard is hopeless here")

    def lease(self, name, shard):
        limits, state = self.limits, self.coordinator
        holders = [w.name for w in self.workers if w.believed_in and w.shard == shard]
        assert len(holders) <= 1 and name not in holders  # a second lease is the last
        assert shard not in {*state.committed, *state.evicted}
        if holders:
            self.seen.add("doubled")
        assert shard < state.cursor + limits.block_shards + limits.ready_ahead
        leased = len(state.leases) * SHARD_BYTES
        assert sum(state.committed.values()) + leased <= limits.max_bytes
        worker = self.named(name)
        assert worker.shard is None
        worker.shard, worker.part = shard, 0.0

    def evict(self, shards):
        assert max(shards) < self.first_read(min(self.kept, default=0))
        self.record |= set(shards)
        for shard in shards:
            if self.fault("killed while evicting", 0.02):
                raise Killed
            self.disk.pop(shard, None)
            self.strays.discard(shard)

    def first_read(self, step):
        return first_shard_read(self.order, self.limits.block_shards, step)

    def named(self, name):
        return next(w for w in self.workers if w.name == name and w.believed_in)

    def fault(self, kind, chance):
        """Whether a fault strikes now; none do in the end, so that the run can finish."""
        if self.tick < FAULTY_TICKS and self.strikes(kind, chance):
            self.seen.add(kind)
            return True
        return False

    def strikes(self, kind, chance):
        """Whether a fault of this kind comes now, while there are faults."""
        return self.rng.random() < chance

    # ---------------------------------------------------------------------------------------
    # Workers

    def staff(self):
        """Workers join up to the target, and leave above it."""
        if self.fault("scaled", 0.05):
            self.target = self.rng.randint(0, 4)
        if self.tick == FAULTY_TICKS:
            self.target = 2
            for worker in self.workers:
                worker.speed = 0.5
        current = [w for w in self.workers if w.believed_in]
        for worker in current[self.target :]:
            if worker.shard is None:
                self.workers.remove(worker)
                self.tell(Left(worker.name, "gone"))
        for _ in range(self.target - len(current)):
            self.num_names += 1
            slow = self.fault("slow worker", 0.3)
            worker = Worker(f"w{self.num_names}", self.rng.uniform(0.01, 0.05) if slow else 0.5)
            self.workers.append(worker)
            self.tell(Arrived(worker.name, Place(f"n{self.num_names % 3}"), "cpu", "n"))
            self.tell(Joined(worker.name))
            self.tell(Asked(worker.name))

    def work(self, seconds):
        for worker in list(self.workers):
            if worker not in self.workers or worker.shard is None:
                continue
            if self.fault("killed", 0.03):
                self.workers.remove(worker)
                if worker.believed_in:
                    self.tell(Left(worker.name, "gone"))
                continue
            if worker.believed_in and self.fault("failed", 0.03):
                worker.shard = None
                self.workers.remove(worker)  # another one takes its place
                self.tell(Failed(worker.name, "boom"))
                self.tell(Left(worker.name, "boom"))
                continue
            if self.fault("hung", 0.1):
                continue
            worker.part += worker.speed * seconds
            if worker.part >= 1:
                self.publish(worker)
            elif worker.believed_in and not self.fault("lost heartbeat", 0.2):
                self.tell(Heartbeat(worker.name))

    def publish(self, worker):
        """Commits unless the shard is there, and reports unless killed in between."""
        shard, worker.shard = worker.shard, None
        if shard in self.disk:
            self.seen.add("duplicate producer")
        else:
            self.disk[shard] = self.rng.randint(SHARD_BYTES // 2, SHARD_BYTES)
            if shard not in self.coordinator.leases:
                self.seen.add("stray")
                self.strays.add(shard)
        if not worker.believed_in:
            self.workers.remove(worker)
        elif self.fault("killed before its report", 0.05):
            self.workers.remove(worker)
            self.tell(Left(worker.name, "gone"))
        else:
            self.tell(Committed(shard, self.disk[shard], worker.name))
            self.tell(Asked(worker.name))

    def scan(self):
        """What the pool does once a second."""
        known = self.coordinator.committed
        for shard in sorted(known.keys() - self.disk.keys()):
            self.tell(Quarantined(shard))
        held = {w.shard for w in self.workers if w.believed_in}
        for shard in sorted(self.disk.keys() - known.keys() - held):
            self.tell(Committed(shard, self.disk[shard]))
        self.tell(CursorMoved(self.cursor))
        if self.coordinator.needs_room:
            self.tell(Released(self.first_read(self.oldest_seen)))
            self.oldest_seen = min(self.kept, default=0)  # seen by the next scan

    # ---------------------------------------------------------------------------------------
    # The trainer

    def read(self):
        """Steps that can be done now, with saves; a bad shard is set aside."""
        if self.fault("trainer killed", 0.03):
            if len(self.kept) > 1 and self.fault("newest checkpoint damaged", 0.3):
                self.kept.pop()
            self.step, self.memory = max(self.kept, default=0), set()
        for _ in range(self.rng.randint(0, 3)):
            if self.step == self.train.max_steps:
                return
            self.cursor = self.order.newest_block(self.step) * self.limits.block_shards
            self.memory &= set(self.order.blocks_of(self.step))
            for block in self.order.blocks_read(self.step):
                if block not in self.memory and not self.load(block):
                    return
            self.consumed[self.step] = self.order.entries(self.step)
            self.step += 1
            if self.step % self.train.save_every == 0 or self.step == self.train.max_steps:
                saved = {*self.kept, self.step}
                self.kept = sorted(saved)[-self.train.keep_last :]

    def load(self, block):
        first = block * self.limits.block_shards
        shards = range(first, first + self.limits.block_shards)
        if not all(shard in self.disk for shard in shards):
            assert not any(s in self.record and s not in self.disk for s in shards)
            return False
        if self.fault("bad shard", 0.05):
            self.disk.pop(self.rng.choice(shards))
            return False
        self.memory.add(block)
        return True

    # ---------------------------------------------------------------------------------------

    def live(self, seconds):
        """A moment of all together."""
        self.now += seconds
        if self.fault("clock jumped", 0.02):
            self.clock += LEASE_S
        if self.fault("coordinator lost", 0.02):
            self.rebuild()
        self.staff()
        self.work(seconds)
        self.scan()
        self.read()
        self.tell(Tick())

    def moment(self, seconds):
        """`live`, and a new coordinator where it was killed."""
        try:
            self.live(seconds)
        except Killed:
            self.rebuild()
        own = [size for shard, size in self.disk.items() if shard not in self.strays]
        assert sum(own) <= self.limits.max_bytes

    def run(self, first_tick=0):
        """Lives until all is trained and made."""
        for self.tick in range(first_tick, MOST_TICKS):
            self.moment(self.rng.uniform(0.1, 2.0))
            if self.step == self.train.max_steps and self.coordinator.is_done:
                return
        raise AssertionError(f"a deadlock: step {self.step}, {self.coordinator}")

    def check(self):
        """The trainer has read what was planned, in this order."""
        steps = self.train.max_steps
        assert sorted(self.consumed) == list(range(steps))
        planned = self.order.entries_between(0, steps * self.train.batch_size)
        for index in range(2):  # ids, passes
            read = np.concatenate([self.consumed[step][index] for step in range(steps)])
            np.testing.assert_array_equal(read, planned[index])


NUM_PARTS, PER_PART = 10, 150


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_the_plan_is_consumed_exactly_under_any_schedule(part):
    struck = set()
    for seed in range(part * PER_PART, (part + 1) * PER_PART):
        print("schedule", seed)  # shown when it fails
        schedule = Schedule(seed)
        schedule.run()
        schedule.check()
        struck |= schedule.seen | ({"evicted"} if schedule.record else set())
    assert struck == {*FAULTS, "doubled", "duplicate producer", "evicted", "stray"}


class DirectedSchedule(Schedule):
    """A world whose faults are chosen from outside: each kind in `faults` strikes half the time."""

    faults: frozenset = frozenset()
    tick = 0

    def strikes(self, kind, chance):
        return kind in self.faults and self.rng.random() < 0.5


class World(RuleBasedStateMachine):
    """hypothesis chooses the faults of every moment, and shrinks those that break something."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed):
        self.schedule = DirectedSchedule(seed)

    @rule(seconds=st.floats(0.1, 2.0), faults=st.frozensets(st.sampled_from(FAULTS), max_size=4))
    def live(self, seconds, faults):
        self.schedule.faults = faults
        self.schedule.moment(seconds)

    @rule(seconds=st.floats(0.1, 2.0), moments=st.integers(1, 5))
    def live_in_peace(self, seconds, moments):
        self.schedule.faults = frozenset()
        for _ in range(moments):
            self.schedule.moment(seconds)

    def teardown(self):
        self.schedule.run(first_tick=FAULTY_TICKS)
        self.schedule.check()


World.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyFaultsAtAnyMoments = World.TestCase
