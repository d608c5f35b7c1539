"""What the events of a run mean, folded once: for status, verify, cost and report. No torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from distill.run import events as kinds
from distill.run.dir import RunDir
from distill.run.events import Event, read_events


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
        leases: those without an end, by shard.
        spans: (lease, commit) of every shard that was made, in the order of the commits.
        made: shards that were committed and not taken back since.
        made_twice: shards with two commits that were not asked for in between: at-least-once work,
            kept once.
        evicted: shards whose tars were deleted for room at any time.
        course: starts of the training, and windows of its steps, in their order.
        waits_for_nodes: there are too few for a group of trainer ranks.
    """

    target: int | None = None
    most: int | None = None
    workers: set[str] = field(default_factory=set)
    lost: int = 0
    changes: list[tuple[float, int, int]] = field(default_factory=list)
    joins: list[float] = field(default_factory=list)
    leases: dict[int, kinds.Lease] = field(default_factory=dict)
    spans: list[tuple[float, float]] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    made_twice: set[int] = field(default_factory=set)
    evicted: set[int] = field(default_factory=set)
    course: list[kinds.Resume | kinds.Steps] = field(default_factory=list)
    waits_for_nodes: bool = False

    @property
    def starts(self) -> list[kinds.Resume]:
        """Starts of the training."""
        return [event for event in self.course if isinstance(event, kinds.Resume)]

    def shards_made(self, times: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
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


def read_history(run: RunDir, say: Callable[[str], None] = lambda _: None) -> History:
    """The history in events.jsonl; `say` as in `read_events`."""
    return replay(read_events(run, say))


def replay(events: Iterable[Event]) -> History:
    """The history of all pools and trainings of a run, one after the other."""
    found, last = History(), 0.0
    for event in events:
        before = (found.target or 0, len(found.workers))
        if isinstance(event, kinds.Pool) and found.workers:
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
        case kinds.Lease():
            found.leases[event.shard] = event
        case kinds.Commit():
            lease = found.leases.pop(event.shard, None)
            is_its = lease is not None and lease.worker == event.worker
            began = lease.time if lease and is_its else event.time - event.seconds
            found.spans.append((min(began, event.time - 1e-3), event.time))  # log: milliseconds
            (found.made_twice if event.shard in found.made else found.made).add(event.shard)
        case kinds.Fail(shard=int(shard)) | kinds.Expire(shard=int(shard)):
            found.leases.pop(shard, None)
        case kinds.Quarantine():
            found.made.discard(event.shard)
        case kinds.Evict():
            found.evicted.update(event.shards)
        case kinds.MakeAgain():
            found.made.difference_update(event.shards)
        case _:
            return False
    return True


def _take_worker(found: History, event: Event) -> bool:
    """Folds an event of teacher workers; whether it was one."""
    match event:
        case kinds.Pool():
            found.target, found.most = event.workers, event.most
            found.leases.clear()  # they ended with the pool before
        case kinds.Scale():
            found.target = event.workers
        case kinds.WorkerJoin():
            found.workers.add(event.worker)
            found.joins.append(event.time)
        case kinds.WorkerLeave():
            found.workers.discard(event.worker)
            found.lost += not event.is_planned
            for shard in [s for s, lease in found.leases.items() if lease.worker == event.worker]:
                del found.leases[shard]
        case _:
            return False
    return True


def _take_training(found: History, event: Event) -> None:
    """Folds an event of the trainer ranks."""
    match event:
        case kinds.Resume() | kinds.Steps():
            found.course.append(event)
        case kinds.Group():
            found.waits_for_nodes = False
        case kinds.GroupWaits():
            found.waits_for_nodes = True
