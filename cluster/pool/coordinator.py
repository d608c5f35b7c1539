"""The ledger of leases: which teacher makes which shard. A pure state machine.

Events and the time go in, actions come out. It knows no Ray, no torch and no clock, and it keeps
nothing of its own: it is rebuilt from the shards found on disk.

    free --ask--> leased --committed--> on disk --room needed--> evicted
      ^              |                     |
      |              |                     '-- quarantined --> free
      '--------------'-- expired, failed, worker left; too often: given up

What fails may be the device (`cluster.pool.health`), so every attempt is by another worker, on
another node as long as there is one, and by one that has made a shard as long as there is one. A
shard is given up when `max_attempts` of those failed on it, three times as many were lost with it,
or ten times as many with their node; where none has made a shard, once all nodes were tried. That a
setting is wrong, or that a teacher gives no numbers, is believed when another node says it too.
Losing a worker is mostly not the shard's fault; but one that kills or hangs whoever makes it must
not go on for ever.

A lease is given for the lowest free shard p, and only if (back-pressure)

    p < cursor + block_shards + ready_ahead   and   bytes on disk + bytes of leases <= max_bytes

A worker that is slow takes no shard that the trainer needs first, but one so far ahead that it is
done when the trainer comes there. A shard that is in hand for longer than usual is leased a second
time: where the trainer is about to need it, and otherwise to a worker that has nothing to do. The
first to commit wins, the other one stops.

When bytes are what is lacking, blocks below `released` are evicted, the oldest first: no checkpoint
that is kept would read them again. An evicted shard counts as made.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf

from cluster.pool import messages
from cluster.pool.health import Error, Health, Worker

# What speaks against a shard: a worker that failed on it, was lost with it, was lost with its node
FAILURE, LOSS, TAKEN = 30, 10, 3
REFUSALS = 2  # that are believed
# A second lease is given of a shard that is in hand for LATE times what is usual. It comes before
# new shards if the trainer is as near as NEAR shards a worker. Both from `benchmarks/simulate.py`.
LATE, NEAR = 1.3, 1.5
BEATEN = 0.5  # of a failure, where the second one is done first
LOOK_S = 1.0  # between two looks for such shards
SLOW_WORKER = 1.5  # times what is usual
PROBES = 256  # shards that are looked at for a slow worker


@dataclass(frozen=True)
class Limits:
    """What bounds the production.

    Attributes:
        num_shards: shards of the whole run, 0 .. num_shards - 1.
        block_shards: shards of one block of the stream.
        ready_ahead: shards at most beyond the newest block that is read.
        max_bytes: shards at most on disk, bytes.
        shard_bytes: expected size of a shard, bytes; the largest seen counts once it is larger.
        lease_timeout_s: a lease without progress for this long goes back, seconds.
        max_attempts: a shard that failed this often is given up; a node or GPU that failed this
            often takes no more work.
    """

    num_shards: int
    block_shards: int
    ready_ahead: int
    max_bytes: int
    shard_bytes: int
    lease_timeout_s: float
    max_attempts: int


@dataclass
class Lease:
    """A shard in the making."""

    worker: str
    expires_s: float
    since_s: float
    slow: int = 0  # times that this was counted against its place


@dataclass
class Suspect:
    """What speaks against a shard, and how much of it is from workers that have made others."""

    points: int = 0
    proven: int = 0
    failures: int = 0
    losses: int = 0
    nodes: set[str] = field(default_factory=set)  # that failed on it

    def __str__(self) -> str:
        found = [f"{self.failures} failures"] if self.failures else []
        if self.losses:
            found.append(f"{self.losses} workers were lost while making it")
        return " and ".join(found)


@dataclass
class Coordinator:
    """The state. `committed` maps the shards on disk to their bytes; `evicted` are those that were
    on disk. All else starts empty.
    """

    limits: Limits
    committed: dict[int, int]
    evicted: set[int] = field(default_factory=set)
    cursor: int = 0  # first shard of the newest block that is read
    released: int = 0  # shards below may be evicted
    leases: dict[int, Lease] = field(default_factory=dict)  # by shard
    doubles: dict[int, Lease] = field(default_factory=dict)  # second ones, by shard
    workers: set[str] = field(default_factory=set)
    waiting: dict[str, None] = field(default_factory=dict)  # that asked, longest wait first
    suspects: dict[int, Suspect] = field(default_factory=dict)  # by shard
    given_up: set[int] = field(default_factory=set)
    excluded: dict[messages.Place, str] = field(default_factory=dict)  # before, for what

    def __post_init__(self) -> None:
        assert not self.evicted & self.committed.keys()
        self._bytes = sum(self.committed.values())
        self._shard_bytes = max(self.limits.shard_bytes, *self.committed.values(), 0)
        made = (*self.committed, *self.evicted)
        self._num_made = sum(shard < self.limits.num_shards for shard in made)
        out = {place: (Error(reason), "") for place, reason in self.excluded.items()}
        self.health = Health(self.limits.max_attempts, out)
        self._is_whole = True  # every worker that is wanted has a process
        self._proven: dict[str, set[str]] = {}  # by node, workers that have made a shard
        self._shard_of: dict[str, int] = {}  # by worker
        self._next_expiry_s = inf  # no lease runs out before
        self._late: list[int] = []  # shards for a second lease, the lowest last
        self._next_look_s = -inf
        self._frontier = 0  # every shard below is taken, or in `_freed`
        self._freed: list[int] = []  # a heap; some may be taken again
        self._again: set[int] = set()  # that some node failed on, and that are free
        self._oldest = 0  # no shard below is on disk

    @property
    def is_done(self) -> bool:
        """Whether every shard of the run was made."""
        return self._num_made == self.limits.num_shards

    @property
    def num_made(self) -> int:
        """Shards of this run on disk or evicted; those of a longer run before do not count."""
        return self._num_made

    @property
    def is_blocked(self) -> bool:
        """Whether back-pressure is what keeps the next shard from being leased."""
        shard = self._lowest_free()
        return shard is not None and not (self._in_window(shard) and self._has_room())

    @property
    def needs_room(self) -> bool:
        """Whether bytes alone keep the next shard from being leased."""
        shard = self._lowest_free()
        return shard is not None and self._in_window(shard) and not self._has_room()

    def handle(self, event: messages.Event, now_s: float) -> list[messages.Action]:
        """The actions that follow from `event` at time `now_s` (seconds on any steady clock)."""
        actions = self._apply(event, now_s) + self._expire(now_s)
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_S
            actions += self._strike_slow(now_s)
            self._look_for_late(now_s)
        for action in actions:
            if isinstance(action, messages.Excluded):
                self._let_wait_no_more()
        patience_s = self.limits.lease_timeout_s
        actions += self.health.judge(now_s, self._is_whole, patience_s)
        return actions + self._grant(now_s)

    def lease_of(self, worker: str) -> int | None:
        """The shard `worker` is making."""
        return self._shard_of.get(worker)

    def _apply(self, event: messages.Event, now_s: float) -> list[messages.Action]:
        match event:
            case messages.Arrived(worker, place, model, birth):
                return self.health.arrive(worker, Worker(place, model, birth))
            case messages.Joined(worker):
                self.workers.add(worker)
            case messages.Left(worker, reason, is_alone):
                return self._lose(worker, reason, is_alone)
            case messages.Unfit(place, birth, error, is_final, is_refusal):
                return self.health.fail(place, birth, Error(error, is_refusal), is_final)
            case messages.Gone(birth):
                self.health.lose(birth)
            case messages.Staffed(is_whole):
                self._is_whole = is_whole
            case messages.Asked(worker):
                assert worker in self.workers, f"{worker} asked before it joined"
                if self.lease_of(worker) is None:
                    self.waiting.setdefault(worker)
            case messages.Heartbeat(worker):
                if (own := self._lease_in_hand(worker)) is not None:
                    own.expires_s = now_s + self.limits.lease_timeout_s
            case messages.Slept(seconds):
                for _, lease in self._all_leases():
                    lease.expires_s += seconds
                    lease.since_s += seconds
            case messages.Committed(shard, num_bytes, worker):
                self._credit(shard, worker, now_s)
                late = self._supersede(shard, worker, now_s)
                self._commit(shard, num_bytes)
                return late
            case messages.Failed():
                return self._fail(event)
            case messages.CursorMoved(first_shard):
                self.cursor = first_shard
            case messages.Released(first_shard):
                self.released = first_shard
            case messages.Quarantined(shard):
                if shard in self.committed:
                    self._bytes -= self.committed.pop(shard)
                    self._num_made -= shard < self.limits.num_shards
                    self._free(shard)
            case messages.Tick():
                pass
        return []

    # ---------------------------------------------------------------------------------------
    # Workers

    def _all_leases(self) -> Iterator[tuple[int, Lease]]:
        yield from self.leases.items()
        yield from self.doubles.items()

    def _lease_in_hand(self, worker: str) -> Lease | None:
        """The lease of a worker."""
        shard = self._shard_of.get(worker)
        if shard is None:
            return None
        lease = self.leases[shard]
        return lease if lease.worker == worker else self.doubles[shard]

    def _commit(self, shard: int, num_bytes: int) -> None:
        if shard not in self.committed and shard not in self.evicted:
            self._num_made += shard < self.limits.num_shards
        self.evicted.discard(shard)  # a producer believed dead has put it there again
        self._bytes += num_bytes - self.committed.get(shard, 0)
        self.committed[shard] = num_bytes
        self._shard_bytes = max(self._shard_bytes, num_bytes)
        self._oldest = min(self._oldest, shard)
        self.suspects.pop(shard, None)
        self._again.discard(shard)
        for leases in (self.leases, self.doubles):
            if shard in leases:
                del self._shard_of[leases.pop(shard).worker]

    def _supersede(self, shard: int, worker: str, now_s: float) -> list[messages.Action]:
        """Who makes the shard too shall stop; whoever began first was slow."""
        found: list[messages.Action] = []
        for leases in (self.leases, self.doubles):
            lease = leases.get(shard)
            if lease is not None and worker not in ("", lease.worker):
                found.append(messages.Superseded(lease.worker, shard))
                if leases is self.leases:
                    found += self._strike(lease, now_s, BEATEN)
        return found

    def _credit(self, shard: int, worker: str, now_s: float) -> None:
        """A shard that is made speaks for its worker."""
        if worker in self.workers:
            lease = self._lease_in_hand(worker) if self._shard_of.get(worker) == shard else None
            self.health.made(worker, now_s - lease.since_s if lease else None)
            self._proven.setdefault(self.health.node_of(worker), set()).add(worker)

    def _is_proven(self, worker: str) -> bool:
        return worker in self._proven.get(self.health.node_of(worker), ())

    def _lose(self, worker: str, reason: str, is_alone: bool = True) -> list[messages.Action]:
        shard, node = self._shard_of.get(worker), self.health.node_of(worker)
        found: list[messages.Action] = []
        if shard is not None:
            suspect = self.suspects.setdefault(shard, Suspect())
            suspect.losses += 1
            if is_alone:
                suspect.nodes.add(node)
            points = LOSS if is_alone else TAKEN
            found = self._suspect(shard, worker, points, Error(reason))
            self._take_back(worker)
        self.workers.discard(worker)
        self.waiting.pop(worker, None)
        if worker in self._proven.get(node, ()):
            self._proven[node].discard(worker)
            if not self._proven[node]:
                del self._proven[node]
        self.health.leave(worker)
        return found

    def _take_back(self, worker: str) -> int | None:
        """The shard the worker had a lease for, which is free again unless another one has it."""
        shard = self._shard_of.pop(worker, None)
        if shard is None:
            return None
        second = self.doubles.pop(shard, None)
        if second is None:
            del self.leases[shard]
            self._free(shard)
        elif second.worker != worker:
            self.leases[shard] = second
        return shard

    def _fail(self, event: messages.Failed) -> list[messages.Action]:
        worker, error = event.worker, Error(event.traceback, event.is_refusal)
        shard, found = self._shard_of.get(worker), list[messages.Action]()
        # Else the lease ran out before, or another worker committed the shard.
        if shard is not None and not event.is_final:
            suspect = self.suspects.setdefault(shard, Suspect())
            suspect.failures += 1
            suspect.nodes.add(self.health.node_of(worker))
            found = self._suspect(shard, worker, FAILURE, error)
        self._take_back(worker)
        if (its := self.health.workers.get(worker)) is not None:
            found += self.health.fail(its.place, its.birth, error, event.is_final)
        return found

    def _suspect(self, shard: int, worker: str, points: int, error: Error) -> list[messages.Action]:
        """Counts against a shard; gives it up when that is enough."""
        suspect = self.suspects[shard]
        suspect.points += points
        suspect.proven += points * self._is_proven(worker)
        enough = FAILURE * self.limits.max_attempts
        if error.is_refusal:
            enough = min(enough, FAILURE * REFUSALS)
        untried = self.health.sound_nodes - suspect.nodes
        if suspect.proven < enough and (suspect.points < enough or untried):
            return []
        self.given_up.add(shard)
        return [messages.GivenUp(shard, str(suspect), error.text, error.is_refusal)]

    def _let_wait_no_more(self) -> None:
        """Workers of excluded places get no lease, until they are ended."""
        for worker in [w for w in self.waiting if w in self.health.workers]:
            if not self.health.takes_work(self.health.workers[worker].place):
                del self.waiting[worker]

    def _strike_slow(self, now_s: float) -> list[messages.Action]:
        """A shard that takes too long counts against its worker's place, again and again."""
        found: list[messages.Action] = []
        for _, lease in self._all_leases():
            age_s = now_s - lease.since_s
            if age_s >= (lease.slow + 1) * self.health.slow_s(lease.worker):
                lease.slow += 1
                found += self._strike(lease, now_s)
        return found

    def _strike(self, lease: Lease, now_s: float, weight: float = 1.0) -> list[messages.Action]:
        its = self.health.workers.get(lease.worker)
        if its is None:
            return []
        age_s, usual_s = now_s - lease.since_s, self.health.usual_s(lease.worker)
        error = Error(f"slow: {age_s:.0f} s for a shard that takes others {usual_s:.0f} s")
        return self.health.fail(its.place, its.birth, error, weight=weight)

    def _look_for_late(self, now_s: float) -> None:
        """Finds the shards that a second lease is good for."""
        health, late = self.health, list[int]()
        for shard, lease in self.leases.items():
            usual_s = health.usual_s(lease.worker)
            if shard not in self.doubles and now_s - lease.since_s >= LATE * usual_s:
                late.append(shard)
        self._late = sorted(late, reverse=True)

    def _expire(self, now_s: float) -> list[messages.Action]:
        if now_s < self._next_expiry_s:
            return []
        expired = [
            (shard, lease.worker) for shard, lease in self._all_leases() if lease.expires_s <= now_s
        ]
        actions: list[messages.Action] = []
        places = [self.health.workers.get(worker) for _, worker in expired]
        for shard, worker in expired:
            actions += [messages.Expired(worker, shard), *self._lose(worker, "no progress")]
        for its in places:  # last: it may exclude a place, and who expired there is gone then
            if its is not None:
                actions += self.health.fail(its.place, its.birth, Error("no progress"))
        # Heartbeats only put an expiry off, so until then none needs to be looked for.
        self._next_expiry_s = min((x.expires_s for _, x in self._all_leases()), default=inf)
        return actions

    # ---------------------------------------------------------------------------------------
    # Shards

    def _grant(self, now_s: float) -> list[messages.Action]:
        actions = self._grant_again(now_s) if self._again else []
        ahead = NEAR * len(self.workers)
        actions += self._grant_late(now_s, self.cursor + self.limits.block_shards + ahead)
        while self.waiting:
            shard = self._next_free()
            if shard is None or not self._in_window(shard):
                break
            actions += self._make_room()
            if not self._has_room():
                break
            worker = next(iter(self.waiting))
            actions.append(self._lease(worker, self._fitting(worker, shard), now_s))
        return actions + self._grant_late(now_s, inf)

    def _fitting(self, worker: str, lowest: int) -> int:
        """The free shard for a worker: the lowest, or one that a slow one can make in time."""
        slowness = self.health.slowness(worker)
        if slowness < SLOW_WORKER:
            return lowest
        window = self.cursor + self.limits.block_shards + self.limits.ready_ahead
        end = min(window, self.limits.num_shards)
        first = min(lowest + int((slowness - 1) * len(self.workers)), end - 1)
        up, down = range(first, end)[:PROBES], range(first, lowest, -1)[:PROBES]
        return next((shard for shard in (*up, *down) if not self._is_taken(shard)), lowest)

    def _grant_late(self, now_s: float, below: float) -> list[messages.Action]:
        """Second leases of shards below a number, each to the first worker that is not slow."""
        actions: list[messages.Action] = []
        while self.waiting and self._late and self._late[-1] < below:
            shard = self._late.pop()
            there = shard in self.leases and self._in_window(shard)
            if not there or shard in self.doubles:
                continue
            slowness = self.health.slowness
            worker = next((w for w in self.waiting if slowness(w) < SLOW_WORKER), None)
            if worker is None:
                break
            actions.append(self._lease(worker, shard, now_s))
        return actions

    def _grant_again(self, now_s: float) -> list[messages.Action]:
        """Leases of shards that failed before, each to a worker of which something follows."""
        actions: list[messages.Action] = []
        for shard in sorted(self._again):
            if not self.waiting or not self._in_window(shard):
                break
            may = self._who_tries(self.suspects[shard])
            worker = next((worker for worker in self.waiting if may(worker)), None)
            if worker is not None:
                actions += self._make_room()
                if not self._has_room():
                    break
                self._again.discard(shard)
                actions.append(self._lease(worker, shard, now_s))
        return actions

    def _who_tries(self, suspect: Suspect) -> Callable[[str], bool]:
        """Which workers a shard may go to now: what nodes failed on shall be tried on others."""
        node_of, failed = self.health.node_of, suspect.nodes
        if self._proven.keys() - failed:
            return lambda worker: node_of(worker) not in failed and self._is_proven(worker)
        if self.health.sound_nodes - failed:
            return lambda worker: node_of(worker) not in failed
        return lambda worker: True

    def _lease(self, worker: str, shard: int, now_s: float) -> messages.Action:
        del self.waiting[worker]
        expires_s = now_s + self.limits.lease_timeout_s
        leases = self.doubles if shard in self.leases else self.leases
        leases[shard] = Lease(worker, expires_s, now_s)
        self._shard_of[worker] = shard
        self._next_expiry_s = min(self._next_expiry_s, expires_s)
        return messages.Leased(worker, shard)

    def _in_window(self, shard: int) -> bool:
        return shard < self.cursor + self.limits.block_shards + self.limits.ready_ahead

    def _has_room(self) -> bool:
        """Whether one more shard fits, once all that are leased are on disk."""
        reserved = (len(self.leases) + 1) * self._shard_bytes
        return self._bytes + reserved <= self.limits.max_bytes

    def _make_room(self) -> list[messages.Action]:
        """Evicts the oldest blocks that may go until one more shard fits."""
        gone: list[int] = []
        while not self._has_room():
            while self._oldest < self.released and self._oldest not in self.committed:
                self._oldest += 1
            if self._oldest >= self.released:
                break
            end = self._oldest - self._oldest % self.limits.block_shards + self.limits.block_shards
            for shard in range(self._oldest, min(end, self.released)):
                if shard in self.committed:
                    self._bytes -= self.committed.pop(shard)
                    self.evicted.add(shard)
                    gone.append(shard)
        return [messages.Evicted(tuple(gone))] if gone else []

    def _is_taken(self, shard: int) -> bool:
        made = shard in self.committed or shard in self.evicted
        return made or shard in self.leases or shard in self.given_up or shard in self._again

    def _free(self, shard: int) -> None:
        if shard in self.given_up:
            return
        if shard in self.suspects and self.suspects[shard].nodes:
            self._again.add(shard)
        elif shard < self._frontier:
            heapq.heappush(self._freed, shard)

    def _lowest_free(self) -> int | None:
        """The lowest shard that nobody has made or makes."""
        return min((x for x in (self._next_free(), *self._again) if x is not None), default=None)

    def _next_free(self) -> int | None:
        """The lowest of those that no node failed on."""
        while self._freed and self._is_taken(self._freed[0]):
            heapq.heappop(self._freed)
        if self._freed:
            return self._freed[0]
        while self._frontier < self.limits.num_shards and self._is_taken(self._frontier):
            self._frontier += 1
        return self._frontier if self._frontier < self.limits.num_shards else None
