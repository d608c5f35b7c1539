"""events.jsonl: what happened, one frozen dataclass for each kind of line. No torch.

    {"time": 1789.123, "kind": "lease", "shard": 7, "worker": "node3:4711"}

The keys are `time`, `kind`, and the fields of the class in their order (`distill.run.records`).
The log explains; but for `resume` and `steps` it is no truth. So a line that this version cannot
read, torn by a crash or written by a newer version, costs itself only, and `verify` says which.
Their meaning is folded once, for status, verify, cost and report: `read_history`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from distill.run import files, records

KINDS: "dict[str, type[Event]]" = {}  # every kind there is, by its name in the file


@dataclass(frozen=True)
class Event(records.Stamped):
    """A line of events.jsonl."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        KINDS[kind] = cls


# -----------------------------------------------------------------------------------------------
# Written by the pool of teacher workers. A worker is "host:process id".


@dataclass(frozen=True)
class Pool(Event, kind="pool"):
    """A pool starts, and with it everything that is told of workers."""

    workers: int  # that there shall be
    most: int | None  # that `bowstring scale` may ask for; None on a cluster: no limit


@dataclass(frozen=True)
class Scale(Event, kind="scale"):
    """Another number of workers is wanted, by `bowstring scale` or by nodes that came and went."""

    workers: int


@dataclass(frozen=True)
class WorkerJoin(Event, kind="worker_join"):
    """A worker has loaded its teachers."""

    device: str = field(default="cpu", kw_only=True)  # "cuda" or "cpu"; once there was cpu only
    worker: str
    fingerprints: dict[str, str]  # sha256 of the weights of each teacher


@dataclass(frozen=True)
class Lease(Event, kind="lease"):
    """A worker is told to make a shard."""

    shard: int
    worker: str


@dataclass(frozen=True)
class Commit(Event, kind="commit"):
    """A shard stands on disk."""

    shard: int
    worker: str
    bytes: int  # of its tar
    seconds: float  # that it took to sample
    batch_size: int | None = None  # samples at once from now on, when memory ran out
    # Of the first shard, where the objective asks between the stored states
    # (`distill.flow.curve.own_error`)
    curve_error: float | None = None


@dataclass(frozen=True)
class Fail(Event, kind="fail"):
    """A worker raised. Its shard is free again, and another worker takes its place."""

    shard: int
    worker: str
    error: str  # last line of its traceback


@dataclass(frozen=True)
class GiveUp(Event, kind="give_up"):
    """A shard cannot be made. The run stops."""

    shard: int
    reason: str


@dataclass(frozen=True)
class Expire(Event, kind="expire"):
    """A worker made no progress for too long, and is ended."""

    shard: int | None  # None: it was still loading its teachers
    worker: str
    reason: str = ""


@dataclass(frozen=True)
class Quarantine(Event, kind="quarantine"):
    """A committed shard is no longer there: a reader has set it aside."""

    shard: int


@dataclass(frozen=True)
class Evict(Event, kind="evict"):
    """The tars of shards are deleted for room."""

    shards: tuple[int, ...]
    step: int  # of the oldest checkpoint; no resume reads these shards


@dataclass(frozen=True)
class MakeAgain(Event, kind="make_again"):
    """Shards were evicted, and are to be made again: the checkpoints behind them are gone."""

    shards: tuple[int, ...]


END_OF_PRODUCTION, SCALED_DOWN = "end of production", "scaled down"
PLANNED = (END_OF_PRODUCTION, SCALED_DOWN)  # reasons to leave that are no loss


@dataclass(frozen=True)
class WorkerLeave(Event, kind="worker_leave"):
    """A worker is gone."""

    worker: str  # "unknown" when it had not said its name
    reason: str

    @property
    def is_planned(self) -> bool:
        """Whether that is no loss."""
        return self.reason in PLANNED


@dataclass(frozen=True)
class Exclude(Event, kind="exclude"):
    """A node or a GPU has failed too often, and takes no more work."""

    node: str
    gpu: str  # "": the whole node
    reason: str  # the last line of the last error


@dataclass(frozen=True)
class Readmit(Event, kind="readmit"):
    """An excluded node or GPU came back, by a new start or a new job, and is tried again."""

    node: str
    gpu: str


# -----------------------------------------------------------------------------------------------
# Written by rank 0 of a training. A checkpoint of step N is the state after N steps.


@dataclass(frozen=True)
class Init(Event, kind="init"):
    """A start of the ranks, before its first step."""

    weights: str  # where they come from, in words


@dataclass(frozen=True)
class Resume(Event, kind="resume"):
    """Training starts; steps from here on are done, or done again."""

    step: int
    world_size: int  # ranks


@dataclass(frozen=True)
class Fallback(Event, kind="fallback"):
    """Newer checkpoints did not verify."""

    step: int  # it goes on from here
    damaged: tuple[int, ...]  # steps


@dataclass(frozen=True)
class Steps(Event, kind="steps"):
    """Proof of what was read."""

    first: int
    last: int  # included
    ids_sha256: str  # of the sample ids of these global batches in order, little-endian int64


@dataclass(frozen=True)
class WandbFailed(Event, kind="wandb"):
    """W&B failed; nothing more is sent to it until the next start."""

    error: str


@dataclass(frozen=True)
class Spike(Event, kind="spike"):
    """The loss of a step stands out."""

    step: int
    loss: float
    median: float  # of the losses before it
    rank: int  # the one with the largest loss
    ids: tuple[int, ...]  # its samples


@dataclass(frozen=True)
class Save(Event, kind="save"):
    """A checkpoint is committed."""

    step: int
    bytes: int = 0  # of all ranks; this and what follows was not always noted
    seconds: float = 0.0  # from its begin to its commit
    stall_s: float = 0.0  # of these, training stood still
    checkpoints: tuple[int, ...] | None = None  # steps of all that are there now


# -----------------------------------------------------------------------------------------------
# Written by the supervisor


@dataclass(frozen=True)
class Group(Event, kind="group"):
    """A group of trainer ranks is started."""

    ranks: int


@dataclass(frozen=True)
class GroupWaits(Event, kind="group_waits"):
    """There are too few nodes for a group; the next `group` ends the wait."""


@dataclass(frozen=True)
class Restart(Event, kind="restart"):
    """The ranks failed and are started again."""

    step: int  # of the checkpoint they go on from
    error: str  # last line


@dataclass(frozen=True)
class Failed(Event, kind="failed"):
    """The run ended."""

    error: str  # the sentence it ended with


@dataclass(frozen=True)
class Unsaved(Event, kind="unsaved"):
    """The run was told to stop, and its ranks did not save."""

    error: str  # why


# -----------------------------------------------------------------------------------------------
# The file


def tree_of(event: Event) -> dict[str, Any]:
    """An event as it stands in the file."""
    tree = records.tree_of(event)
    return {"time": tree.pop("time"), "kind": event.kind, **tree}


def append(run: files.RunDir, *events: Event) -> None:
    """Writes events by a single write, flushed to disk."""
    files.append_lines(run.events, [tree_of(event) for event in events])


class EventLog:
    """Events of one process, in order, written when it has time for that."""

    def __init__(self, run: files.RunDir) -> None:
        self._run = run
        self._events: list[Event] = []

    def add(self, event: Event) -> None:
        """Takes an event."""
        self._events.append(event)

    def flush(self) -> None:
        """Writes what was taken."""
        if self._events:
            append(self._run, *self._events)
            self._events.clear()


def read_events(run: files.RunDir, say: Callable[[str], None] = lambda _: None) -> Iterator[Event]:
    """The events in the order of the file.

    `say` takes a sentence for every line that is not read, or not read whole: fields that are not
    known are left out, and so are lines of a kind that is not known.
    """
    file = run.events.name
    for number, record in files.numbered_lines(run.events):
        if record is None:
            say(f"{file} line {number}: no JSON object, as a crash leaves it")
            continue
        name = record.pop("kind", None)
        kind = KINDS.get(name) if isinstance(name, str) else None
        if kind is None:
            say(f"{file} line {number}: kind {name!r} is not known; a newer version may know it")
            continue
        try:
            event = records.record_of(kind, record)
        except records.NewerRecord as error:
            say(f"{file} line {number}: {name} {error}; its other fields are")
            event = records.record_of(kind, records.known_part(kind, record))
        except records.RecordError as error:
            say(f"{file} line {number}: {name} {error}; the line counts for nothing")
            continue
        yield event


def changed_lines(run: files.RunDir) -> list[int]:
    """Numbers of lines that are no JSON object though they are whole, so no crash has cut them."""
    lines = files.read_bytes(run.events).splitlines() if run.events.exists() else []
    torn = {number for number, record in files.numbered_lines(run.events) if record is None}
    return [
        number
        for number, line in enumerate(lines, 1)
        if number in torn and line.count(b"{") == line.count(b"}")
    ]


# -----------------------------------------------------------------------------------------------
# What they mean


@dataclass
class History:
    """A run so far. `replay` makes it; times are Unix times in seconds.

    Attributes:
        target: teacher workers that there shall be; None before the first pool.
        most: how many `bowstring scale` may ask for; None for no limit.
        workers: names of those at work: their teachers are loaded.
        lost: workers that left unplanned.
        changes: (time, workers wanted, workers at work), each until the next one.
        joins: when workers came.
        excluded: nodes and GPUs that take no more work, by (node, gpu).
        leases: those without an end, by shard and worker.
        spans: (lease, commit) of every shard that was made, in the order of the commits.
        made: shards that were committed and not taken back since.
        made_twice: shards with two commits that were not asked for in between: at-least-once work,
            kept once.
        evicted: shards whose tars were deleted for room at any time.
        course: starts of the training, and windows of its steps, in their order.
        waits_for_nodes: there are too few for a group of trainer ranks.
        checkpoints: steps of those that shall be there: newer than the last start of the training
            are only those that it has saved.
        told: steps of which a save or a start tells that there was a checkpoint.
        save_s: what the last save took.
    """

    target: int | None = None
    most: int | None = None
    workers: set[str] = field(default_factory=set)
    lost: int = 0
    changes: list[tuple[float, int, int]] = field(default_factory=list)
    joins: list[float] = field(default_factory=list)
    excluded: dict[tuple[str, str], Exclude] = field(default_factory=dict)
    leases: dict[tuple[int, str], Lease] = field(default_factory=dict)
    spans: list[tuple[float, float]] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    made_twice: set[int] = field(default_factory=set)
    evicted: set[int] = field(default_factory=set)
    course: list[Resume | Steps] = field(default_factory=list)
    waits_for_nodes: bool = False
    checkpoints: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    save_s: float = 0.0

    @property
    def starts(self) -> list[Resume]:
        """Starts of the training."""
        return [event for event in self.course if isinstance(event, Resume)]

    def shards_made(
        self, times: Sequence[float] | np.typing.NDArray[np.float64]
    ) -> np.typing.NDArray[np.float64]:
        """Shards made until `times`. A shard counts evenly from its lease to its commit."""
        times = np.asarray(times, dtype=np.float64)
        if not self.spans:
            return np.zeros_like(times)
        began, ended = np.array(self.spans).T
        slope = 1 / (ended - began)
        at = np.concatenate([began, ended])
        order = np.argsort(at, kind="stable")
        at, slopes = at[order], np.concatenate([slope, -slope])[order].cumsum()
        made = np.concatenate([[0.0], (slopes[:-1] * np.diff(at)).cumsum()])
        return np.interp(times, at, made)


def read_history(run: files.RunDir, say: Callable[[str], None] = lambda _: None) -> History:
    """The history in events.jsonl; `say` as in `read_events`."""
    return replay(read_events(run, say))


def replay(events: Iterable[Event]) -> History:
    """The history of all pools and trainings of a run, one after the other."""
    found, last = History(), 0.0
    for event in events:
        before = (found.target or 0, len(found.workers))
        if isinstance(event, Pool) and found.workers:
            # The last supervisor was killed, and could not say so.
            found.changes.append((last, before[0], 0))
            found.workers.clear()
        if not (_take_shard(found, event) or _take_worker(found, event)):
            _take_training(found, event)
        now = (found.target or 0, len(found.workers))
        if now != before:
            found.changes.append((event.time, *now))
        last = event.time
    return found


def _take_shard(found: History, event: Event) -> bool:
    """Folds an event of a shard; whether it was one."""
    match event:
        case Lease():
            found.leases[event.shard, event.worker] = event
        case Commit():
            lease = found.leases.get((event.shard, event.worker))
            began = lease.time if lease else event.time - event.seconds
            for key in [key for key in found.leases if key[0] == event.shard]:
                del found.leases[key]  # a second worker drops it
            found.spans.append((min(began, event.time - 1e-3), event.time))  # log: milliseconds
            (found.made_twice if event.shard in found.made else found.made).add(event.shard)
        case Fail(shard=int(shard)) | Expire(shard=int(shard)):
            found.leases.pop((shard, event.worker), None)
        case Quarantine():
            found.made.discard(event.shard)
        case Evict():
            found.evicted.update(event.shards)
        case MakeAgain():
            found.made.difference_update(event.shards)
        case _:
            return False
    return True


def _take_worker(found: History, event: Event) -> bool:
    """Folds an event of teacher workers; whether it was one."""
    match event:
        case Pool():
            found.target, found.most = event.workers, event.most
            found.leases.clear()  # they ended with the pool before
        case Scale():
            found.target = event.workers
        case WorkerJoin():
            found.workers.add(event.worker)
            found.joins.append(event.time)
        case WorkerLeave():
            found.workers.discard(event.worker)
            found.lost += not event.is_planned
            for key in [key for key in found.leases if key[1] == event.worker]:
                del found.leases[key]
        case Exclude():
            found.excluded[event.node, event.gpu] = event
        case Readmit():
            found.excluded.pop((event.node, event.gpu), None)
        case _:
            return False
    return True


def _take_training(found: History, event: Event) -> None:
    """Folds an event of the trainer ranks."""
    match event:
        case Steps():
            found.course.append(event)
        case Resume():
            found.course.append(event)
            own = {event.step} - {0}
            # A newer one than is told of: a kill came between its commit, with which older ones may
            # have gone, and its event.
            is_untold = event.step > max(found.checkpoints, default=0)
            older = set() if is_untold else found.checkpoints
            found.checkpoints = own | {step for step in older if step < event.step}
            found.told |= own
        case Save():
            found.told.add(event.step)
            found.save_s = event.seconds
            found.checkpoints = {event.step, *(event.checkpoints or ())}
        case Group():
            found.waits_for_nodes = False
        case GroupWaits():
            found.waits_for_nodes = True
