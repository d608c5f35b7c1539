"""The ledger of leases: which teacher makes which shard. A pure state machine.

Events and the time go in, actions come out. It knows no Ray, no torch and no clock, and it keeps
nothing of its own: it is rebuilt from the shards found on disk.

    free --ask--> leased --committed--> on disk --room needed--> evicted
      ^              |                     |
      |              |                     '-- quarantined --> free
      '--------------'-- expired, failed, worker left; too often: given up

Every attempt is on another worker: who fails is replaced (`cluster.pool.pool`). A shard is given up
when `max_attempts` workers failed on it, or three times as many were lost with it. Losing a worker
is mostly not the shard's fault; but one that kills or hangs whoever makes it must not go on for
ever.

A lease is given for the lowest free shard p, and only if (back-pressure)

    p < cursor + block_shards + ready_ahead   and   bytes on disk + bytes of leases <= max_bytes

When bytes are what is lacking, blocks below `released` are evicted, the oldest first: no checkpoint
that is kept would read them again. An evicted shard counts as made.
"""

import heapq
from dataclasses import dataclass, field
from math import inf

from cluster.pool import messages

LOSSES_PER_ATTEMPT = 3


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
        max_attempts: a shard that failed this often, or was lost with its worker
            LOSSES_PER_ATTEMPT times as often, is given up.
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
    workers: set[str] = field(default_factory=set)
    waiting: dict[str, None] = field(default_factory=dict)  # that asked, longest wait first
    attempts: dict[int, int] = field(default_factory=dict)  # failures by shard
    losses: dict[int, int] = field(default_factory=dict)  # workers lost by shard
    given_up: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        assert not self.evicted & self.committed.keys()
        self._bytes = sum(self.committed.values())
        self._shard_bytes = max(self.limits.shard_bytes, *self.committed.values(), 0)
        made = (*self.committed, *self.evicted)
        self._num_made = sum(shard < self.limits.num_shards for shard in made)
        self._shard_of: dict[str, int] = {}  # by worker
        self._next_expiry_s = inf  # no lease runs out before
        self._frontier = 0  # every shard below is taken, or in `_freed`
        self._freed: list[int] = []  # a heap; some may be taken again
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
        shard = self._next_free()
        return shard is not None and not (self._in_window(shard) and self._has_room())

    @property
    def needs_room(self) -> bool:
        """Whether bytes alone keep the next shard from being leased."""
        shard = self._next_free()
        return shard is not None and self._in_window(shard) and not self._has_room()

    def handle(self, event: messages.Event, now_s: float) -> list[messages.Action]:
        """The actions that follow from `event` at time `now_s` (seconds on any steady clock)."""
        actions = self._apply(event, now_s)
        return actions + self._expire(now_s) + self._grant(now_s)

    def lease_of(self, worker: str) -> int | None:
        """The shard `worker` is making."""
        return self._shard_of.get(worker)

    def _apply(self, event: messages.Event, now_s: float) -> list[messages.Action]:
        match event:
            case messages.Joined(worker):
                self.workers.add(worker)
            case messages.Left(worker, reason):
                return self._lose(worker, reason)
            case messages.Asked(worker):
                assert worker in self.workers, f"{worker} asked before it joined"
                if self.lease_of(worker) is None:
                    self.waiting.setdefault(worker)
            case messages.Heartbeat(worker):
                shard = self.lease_of(worker)
                if shard is not None:
                    self.leases[shard].expires_s = now_s + self.limits.lease_timeout_s
            case messages.Slept(seconds):
                for lease in self.leases.values():
                    lease.expires_s += seconds
            case messages.Committed(shard, num_bytes):
                self._commit(shard, num_bytes)
            case messages.Failed(worker, traceback):
                return self._fail(worker, traceback)
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

    def _commit(self, shard: int, num_bytes: int) -> None:
        if shard not in self.committed and shard not in self.evicted:
            self._num_made += shard < self.limits.num_shards
        self.evicted.discard(shard)  # a producer believed dead has put it there again
        self._bytes += num_bytes - self.committed.get(shard, 0)
        self.committed[shard] = num_bytes
        self._shard_bytes = max(self._shard_bytes, num_bytes)
        self._oldest = min(self._oldest, shard)
        self.attempts.pop(shard, None)
        self.losses.pop(shard, None)
        if shard in self.leases:
            del self._shard_of[self.leases.pop(shard).worker]

    def _lose(self, worker: str, reason: str) -> list[messages.Action]:
        self.workers.discard(worker)
        self.waiting.pop(worker, None)
        shard = self._take_back(worker)
        if shard is None:
            return []
        self.losses[shard] = self.losses.get(shard, 0) + 1
        if self.losses[shard] < LOSSES_PER_ATTEMPT * self.limits.max_attempts:
            return []
        self.given_up.add(shard)
        return [
            messages.GivenUp(
                shard, f"{self.losses[shard]} workers were lost while making it", reason
            )
        ]

    def _take_back(self, worker: str) -> int | None:
        """The shard the worker had a lease for, which is free again."""
        shard = self._shard_of.pop(worker, None)
        if shard is not None:
            del self.leases[shard]
            self._free(shard)
        return shard

    def _fail(self, worker: str, traceback: str) -> list[messages.Action]:
        shard = self._take_back(worker)
        if shard is None:  # the lease ran out before, or another worker committed the shard
            return []
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        if self.attempts[shard] < self.limits.max_attempts:
            return []
        self.given_up.add(shard)
        return [messages.GivenUp(shard, f"{self.attempts[shard]} failures", traceback)]

    def _expire(self, now_s: float) -> list[messages.Action]:
        if now_s < self._next_expiry_s:
            return []
        expired = [
            (shard, lease.worker)
            for shard, lease in self.leases.items()
            if lease.expires_s <= now_s
        ]
        actions: list[messages.Action] = []
        for shard, worker in expired:
            actions += [messages.Expired(worker, shard), *self._lose(worker, "no progress")]
        # Heartbeats only put an expiry off, so until then none needs to be looked for.
        self._next_expiry_s = min((x.expires_s for x in self.leases.values()), default=inf)
        return actions

    # ---------------------------------------------------------------------------------------
    # Shards

    def _grant(self, now_s: float) -> list[messages.Action]:
        actions: list[messages.Action] = []
        while self.waiting:
            shard = self._next_free()
            if shard is None or not self._in_window(shard):
                break
            actions += self._make_room()
            if not self._has_room():
                break
            worker = next(iter(self.waiting))
            del self.waiting[worker]
            expires_s = now_s + self.limits.lease_timeout_s
            self.leases[shard], self._shard_of[worker] = Lease(worker, expires_s), shard
            self._next_expiry_s = min(self._next_expiry_s, expires_s)
            actions.append(messages.Leased(worker, shard))
        return actions

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
        return made or shard in self.leases or shard in self.given_up

    def _free(self, shard: int) -> None:
        if shard < self._frontier:
            heapq.heappush(self._freed, shard)

    def _next_free(self) -> int | None:
        """The lowest shard that nobody has made or makes."""
        while self._freed and self._is_taken(self._freed[0]):
            heapq.heappop(self._freed)
        if self._freed:
            return self._freed[0]
        while self._frontier < self.limits.num_shards and self._is_taken(self._frontier):
            self._frontier += 1
        return self._frontier if self._frontier < self.limits.num_shards else None
