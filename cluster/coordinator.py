"""The ledger of leases: which teacher makes which shard. A pure state machine.

Events and the time go in, actions come out. It knows no Ray, no torch and no clock, and it keeps
nothing of its own: it is rebuilt from the shards found on disk.

    free --ask--> leased --committed--> on disk --quarantined--> free
      ^              |
      '-- expired, failed, worker left; failed `max_attempts` times: given up

A lease is given for the lowest free shard p, and only if (back-pressure)

    p < cursor + block_shards + ready_ahead   and   bytes on disk + bytes of leases <= max_bytes
"""

from __future__ import annotations

from dataclasses import dataclass, field

# -----------------------------------------------------------------------------------------------
# Events


@dataclass(frozen=True)
class Joined:
    """A worker is ready to work."""

    worker: str


@dataclass(frozen=True)
class Left:
    """A worker is gone, by its own will or not."""

    worker: str


@dataclass(frozen=True)
class Asked:
    """A worker wants a lease. The wish stands until it gets one."""

    worker: str


@dataclass(frozen=True)
class Heartbeat:
    """A worker is seen making progress."""

    worker: str


@dataclass(frozen=True)
class Committed:
    """A shard stands on disk with its sidecar, whoever made it."""

    shard: int
    num_bytes: int


@dataclass(frozen=True)
class Failed:
    """A worker raised while it made its shard."""

    worker: str
    traceback: str


@dataclass(frozen=True)
class CursorMoved:
    """The trainer reads the block that starts at `first_shard`."""

    first_shard: int


@dataclass(frozen=True)
class Quarantined:
    """A shard failed its check and was set aside; it must be made again."""

    shard: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Joined | Left | Asked | Heartbeat | Committed | Failed | CursorMoved | Quarantined | Tick

# -----------------------------------------------------------------------------------------------
# Actions


@dataclass(frozen=True)
class Leased:
    """`worker` shall make `shard`."""

    worker: str
    shard: int


@dataclass(frozen=True)
class Expired:
    """`worker` made no progress for too long; its shard is free again and it counts as gone."""

    worker: str
    shard: int


@dataclass(frozen=True)
class GivenUp:
    """`shard` failed too often; it is leased no more."""

    shard: int
    traceback: str


Action = Leased | Expired | GivenUp

# -----------------------------------------------------------------------------------------------
# State


@dataclass(frozen=True)
class Limits:
    """What bounds the production.

    Attributes:
        num_shards: shards of the whole run, 0 .. num_shards - 1.
        block_shards: shards of one block of the stream.
        ready_ahead: shards at most beyond the block that is read.
        max_bytes: shards at most on disk, bytes.
        shard_bytes: expected size of a shard, bytes; the largest seen counts once it is larger.
        lease_timeout_s: a lease without progress for this long goes back, seconds.
        max_attempts: a shard that failed this often is given up.
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
    """The state. `committed` maps the shards on disk to their bytes; all else starts empty."""

    limits: Limits
    committed: dict[int, int]
    cursor: int = 0  # first shard of the block that is read
    leases: dict[int, Lease] = field(default_factory=dict)  # by shard
    workers: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)  # workers that asked, longest wait first
    attempts: dict[int, int] = field(default_factory=dict)  # failures by shard
    given_up: dict[int, str] = field(default_factory=dict)  # traceback by shard

    @property
    def is_done(self) -> bool:
        """Whether every shard of the run stands on disk."""
        return self.num_committed == self.limits.num_shards

    @property
    def num_committed(self) -> int:
        """Shards of this run on disk; those of a longer run before do not count."""
        return sum(shard < self.limits.num_shards for shard in self.committed)

    @property
    def is_blocked(self) -> bool:
        """Whether back-pressure is what keeps the next shard from being leased."""
        return self._next_free() is not None and self._next_shard() is None

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """The actions that follow from `event` at time `now_s` (seconds on any steady clock)."""
        actions = self._apply(event, now_s)
        return actions + self._expire(now_s) + self._grant(now_s)

    def lease_of(self, worker: str) -> int | None:
        """The shard `worker` is making."""
        return next((shard for shard, lease in self.leases.items() if lease.worker == worker), None)

    def _apply(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case Joined(worker):
                self.workers.add(worker)
            case Left(worker):
                self._forget(worker)
            case Asked(worker):
                assert worker in self.workers, f"{worker} asked before it joined"
                if worker not in self.waiting and self.lease_of(worker) is None:
                    self.waiting.append(worker)
            case Heartbeat(worker):
                shard = self.lease_of(worker)
                if shard is not None:
                    self.leases[shard].expires_s = now_s + self.limits.lease_timeout_s
            case Committed(shard, num_bytes):
                self.committed[shard] = num_bytes
                self.leases.pop(shard, None)
                self.attempts.pop(shard, None)
            case Failed(worker, traceback):
                return self._fail(worker, traceback)
            case CursorMoved(first_shard):
                self.cursor = first_shard
            case Quarantined(shard):
                self.committed.pop(shard, None)
            case Tick():
                pass
        return []

    def _forget(self, worker: str) -> None:
        self.workers.discard(worker)
        if worker in self.waiting:
            self.waiting.remove(worker)
        shard = self.lease_of(worker)
        if shard is not None:
            del self.leases[shard]

    def _fail(self, worker: str, traceback: str) -> list[Action]:
        shard = self.lease_of(worker)
        if shard is None:  # the lease ran out before, or another worker committed the shard
            return []
        del self.leases[shard]
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        if self.attempts[shard] < self.limits.max_attempts:
            return []
        self.given_up[shard] = traceback
        return [GivenUp(shard, traceback)]

    def _expire(self, now_s: float) -> list[Action]:
        expired = [
            (shard, lease.worker)
            for shard, lease in self.leases.items()
            if lease.expires_s <= now_s
        ]
        for _, worker in expired:
            self._forget(worker)
        return [Expired(worker, shard) for shard, worker in expired]

    def _grant(self, now_s: float) -> list[Action]:
        granted: list[Action] = []
        while self.waiting and (shard := self._next_shard()) is not None:
            worker = self.waiting.pop(0)
            self.leases[shard] = Lease(worker, now_s + self.limits.lease_timeout_s)
            granted.append(Leased(worker, shard))
        return granted

    def _next_free(self) -> int | None:
        taken = self.committed.keys() | self.leases.keys() | self.given_up.keys()
        return next((shard for shard in range(self.limits.num_shards) if shard not in taken), None)

    def _next_shard(self) -> int | None:
        """The lowest free shard, or None when there is none or back-pressure holds it."""
        shard = self._next_free()
        if (
            shard is None
            or shard >= self.cursor + self.limits.block_shards + self.limits.ready_ahead
        ):
            return None
        shard_bytes = max(self.limits.shard_bytes, *self.committed.values(), 0)
        if (
            sum(self.committed.values()) + (len(self.leases) + 1) * shard_bytes
            > self.limits.max_bytes
        ):
            return None
        return shard
