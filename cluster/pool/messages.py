"""What the coordinator is told, and what it answers. Plain values, so they can be made up in a
test.
"""

from dataclasses import dataclass

# -----------------------------------------------------------------------------------------------
# Events


@dataclass(frozen=True)
class Joined:
    """A worker is ready to work."""

    worker: str


@dataclass(frozen=True)
class Left:
    """A worker is gone, by its own will or not; `reason` in words."""

    worker: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """A worker wants a lease. The wish stands until it gets one."""

    worker: str


@dataclass(frozen=True)
class Heartbeat:
    """A worker is seen making progress."""

    worker: str


@dataclass(frozen=True)
class Slept:
    """Nobody listened to the workers for so long; it counts against none of them."""

    seconds: float


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
    """The newest block that the trainer reads starts at `first_shard`."""

    first_shard: int


@dataclass(frozen=True)
class Released:
    """No checkpoint that is kept would read a shard below `first_shard` again."""

    first_shard: int


@dataclass(frozen=True)
class Quarantined:
    """A shard failed its check and was set aside; it must be made again."""

    shard: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = (
    Joined
    | Left
    | Asked
    | Heartbeat
    | Committed
    | Failed
    | CursorMoved
    | Released
    | Quarantined
    | Slept
    | Tick
)

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
    """`shard` is leased no more, for a reason in words; the last traceback or cause."""

    shard: int
    reason: str
    traceback: str


@dataclass(frozen=True)
class Evicted:
    """The bytes of `shards` shall be deleted before the next action: their room is needed."""

    shards: tuple[int, ...]


Action = Leased | Expired | GivenUp | Evicted
