"""What the coordinator is told, and what it answers. Plain values, so they can be made up in a
test.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A GPU of a node; or the node itself, and its cores, where `gpu` is ""."""

    node: str
    gpu: str = ""

    @property
    def whole(self) -> "Place":
        """The node."""
        return Place(self.node)

    def __str__(self) -> str:
        return f"{self.node}, GPU {self.gpu}" if self.gpu else self.node


# -----------------------------------------------------------------------------------------------
# Events


@dataclass(frozen=True)
class Arrived:
    """A worker has a process, on a device of some model. `birth` is the node of Ray that it came
    with: another one after the machine was away.
    """

    worker: str
    place: Place
    model: str = ""
    birth: str = ""


@dataclass(frozen=True)
class Joined:
    """A worker is ready to work."""

    worker: str


@dataclass(frozen=True)
class Left:
    """A worker is gone, by its own will or not; `reason` in words. With its node, or ended from
    here: then its shard is hardly to blame.
    """

    worker: str
    reason: str
    is_alone: bool = True


@dataclass(frozen=True)
class Unfit:
    """A place failed, and no shard with it: it could not load the teachers, or its worker died.

    `is_final`: to try again there is of no use. `is_refusal`: its worker says that a setting is
    wrong.
    """

    place: Place
    birth: str
    error: str
    is_final: bool = False
    is_refusal: bool = False


@dataclass(frozen=True)
class Gone:
    """A node of Ray is gone."""

    birth: str


@dataclass(frozen=True)
class Staffed:
    """Whether every worker that is wanted has a process."""

    is_whole: bool


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
    """A shard stands on disk with its sidecar. `worker` made it; "" where that is not known."""

    shard: int
    num_bytes: int
    worker: str = ""


@dataclass(frozen=True)
class Failed:
    """A worker raised while it made its shard; as a refusal, if it says that a setting is wrong or
    a teacher gives no numbers. `is_final`: no shard can be made there.
    """

    worker: str
    traceback: str
    is_refusal: bool = False
    is_final: bool = False


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
    Arrived
    | Joined
    | Left
    | Unfit
    | Gone
    | Staffed
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
class Superseded:
    """`shard`, which `worker` is making, was made by another one: it shall stop, and ask."""

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
    is_refusal: bool = False


@dataclass(frozen=True)
class Evicted:
    """The bytes of `shards` shall be deleted before the next action: their room is needed."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class Excluded:
    """A node or a GPU takes no more work, and its workers shall be ended. `reason` is the last line
    of the last error.
    """

    place: Place
    reason: str


@dataclass(frozen=True)
class Readmitted:
    """An excluded node or GPU came back, and is tried again."""

    place: Place


@dataclass(frozen=True)
class Hopeless:
    """Most nodes can make no shards: the run ends, with this sentence."""

    reason: str
    is_refusal: bool


Action = Leased | Superseded | Expired | GivenUp | Evicted | Excluded | Readmitted | Hopeless
