"""Which nodes and GPUs are fit to make shards. A part of the coordinator, pure as it is.

A failure counts against its place: a GPU, or a node where workers compute on CPU. A shard that is
made forgives those before it. After `limit` failures for each of its workers a place takes no more
work; a node takes none when none of its GPUs does, or at once when its files are wrong.

Where the run ends is decided by nodes, not by failures: it ends when more than half of those that
are there can make nothing. A node that comes back as a new node of Ray, mended or not, is tried
again, and then one failure is enough.

A shard that takes more than SLOW times the median of the last ones of the same model is a failure
for each such span, and half a one if another worker that began later is done first: devices of
another model may be slow by right, and one shard by chance.
"""

import re
from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf
from statistics import median

from cluster.pool.messages import Action, Excluded, Hopeless, Place, Readmitted

SLOW = 4.0  # medians
MIN_SLOW_S = 30.0  # below it, other things than the device count
NEWEST = 0.3  # weight of the last shard in what is known of a worker
FEWEST, LAST = 8, 64  # shards that a median is taken of
ROUNDS = 1  # that workers of a model make before: the first to be done are the fast ones


@dataclass(frozen=True)
class Error:
    """What went wrong. `is_refusal`: the worker says that a setting is wrong."""

    text: str
    is_refusal: bool = False

    @property
    def last_line(self) -> str:
        """The line of a traceback that says it."""
        return (self.text.strip().splitlines() or ["no reason given"])[-1]

    @property
    def likeness(self) -> str:
        """The same for errors that differ in numbers and addresses only."""
        return re.sub(r"0x[0-9a-f]+|\d+", "#", self.last_line)


@dataclass(frozen=True)
class Worker:
    """A process of the pool. `birth` is one node of Ray, of which a machine may be several."""

    place: Place
    model: str
    birth: str


@dataclass
class Health:
    """The state. `out` are the places that take no work, a node or a GPU, each with what it did
    last and when it was born.
    """

    limit: int
    out: dict[Place, tuple[Error, str]] = field(default_factory=dict)
    failures: dict[Place, float] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)  # that have a process

    def __post_init__(self) -> None:
        self._nodes: dict[str, tuple[str, set[Place]]] = {}  # birth, and places with a worker ever
        self._there: Counter[Place] = Counter()  # workers
        self._most: Counter[Place] = Counter()  # that there ever were
        self._seconds: dict[str, deque[float]] = {}  # by model, what the last shards took
        self._made: Counter[str] = Counter()  # by model
        self._of: Counter[str] = Counter()  # workers there are, by model
        self._usual_s: dict[str, float] = {}  # by model, the median
        self._own_s: dict[str, float] = {}  # by worker, what a shard takes it
        self._agreed_s = inf  # when most nodes were out first
        self._judged: bool | None = None  # `is_whole` of a judgement since which nothing changed

    # ---------------------------------------------------------------------------------------
    # Workers

    def arrive(self, name: str, worker: Worker) -> list[Action]:
        """A worker has a process, and its place is known."""
        self._judged = None
        self.workers[name] = worker
        birth, places = self._nodes.get(worker.place.node, ("", set()))
        places = places if birth == worker.birth else set()
        self._nodes[worker.place.node] = (worker.birth, places | {worker.place})
        self._there[worker.place] += 1
        self._of[worker.model] += 1
        self._most[worker.place] = max(self._most[worker.place], self._there[worker.place])
        back: list[Action] = []
        for place in sorted({worker.place, worker.place.whole}, key=str):
            if place in self.out and self.out[place][1] != worker.birth:
                del self.out[place]
                self.failures[worker.place] = self._enough(worker.place) - 1
                back.append(Readmitted(place))
        return back

    def leave(self, name: str) -> None:
        """A worker is gone."""
        if name in self.workers:
            worker = self.workers.pop(name)
            self._there[worker.place] -= 1
            self._of[worker.model] -= 1
            self._own_s.pop(name, None)
            self._judged = None

    def lose(self, birth: str) -> None:
        """A node is gone from Ray."""
        self._nodes = {name: node for name, node in self._nodes.items() if node[0] != birth}
        self._judged = None

    def _enough(self, place: Place) -> int:
        """Failures from which on it takes no more work."""
        return self.limit * max(1, self._most[place])

    def node_of(self, name: str) -> str:
        """The node of a worker; "" when it is not known."""
        return self.workers[name].place.node if name in self.workers else ""

    def takes_work(self, place: Place) -> bool:
        """Whether neither the GPU nor its node is out."""
        return place not in self.out and place.whole not in self.out

    @property
    def births(self) -> set[str]:
        """The nodes of Ray that workers came with, but for those that are lost."""
        return {birth for birth, _ in self._nodes.values()}

    @property
    def sound_nodes(self) -> set[str]:
        """Nodes with a worker whose place takes work."""
        return {w.place.node for w in self.workers.values() if self.takes_work(w.place)}

    # ---------------------------------------------------------------------------------------
    # Failures

    def made(self, name: str, seconds: float | None) -> None:
        """A worker has made a shard, in so many seconds if that is known."""
        worker = self.workers.get(name)
        if worker is None:
            return
        is_slow = seconds is not None and seconds >= self.slow_s(name)
        if not is_slow:
            self.failures.pop(worker.place, None)
        if seconds is not None:
            before = self._own_s.get(name, seconds)
            self._own_s[name] = before + NEWEST * (seconds - before)
            last = self._seconds.setdefault(worker.model, deque(maxlen=LAST))
            last.append(seconds)
            self._made[worker.model] += 1
            if self._made[worker.model] >= max(FEWEST, ROUNDS * self._of[worker.model]):
                self._usual_s[worker.model] = median(last)

    def usual_s(self, name: str) -> float:
        """Seconds that a shard takes workers of this one's model; infinite while that is open."""
        worker = self.workers.get(name)
        return inf if worker is None else self._usual_s.get(worker.model, inf)

    def slow_s(self, name: str) -> float:
        """Seconds from which on a shard of this worker is slow beyond the others."""
        return max(MIN_SLOW_S, SLOW * self.usual_s(name))

    @property
    def least_usual_s(self) -> float:
        """Seconds that a shard takes the fastest model."""
        return min(self._usual_s.values(), default=inf)

    def slowness(self, name: str) -> float:
        """Times that a shard takes this worker longer than those of the fastest model; 1 where that
        is not known.
        """
        own_s = self._own_s.get(name, self.usual_s(name))
        return own_s / self.least_usual_s if own_s < inf and self.least_usual_s > 0 else 1.0

    def fail(
        self, place: Place, birth: str, error: Error, is_final: bool = False, weight: float = 1.0
    ) -> list[Action]:
        """Counts a failure, or a part of one; a final one counts for all. What a setting is to
        blame for, as a worker says before it makes a shard, is the whole node's: its files are.
        """
        if not self.takes_work(place):
            return []
        if is_final:
            return self._exclude(place.whole if error.is_refusal else place, birth, error)
        self.failures[place] = self.failures.get(place, 0.0) + weight
        if self.failures[place] < self._enough(place):
            return []
        text = f"{self.failures[place]:.0f} failures, the last: {error.text}"
        return self._exclude(place, birth, Error(text, error.is_refusal))

    def _exclude(self, place: Place, birth: str, error: Error) -> list[Action]:
        self._judged = None
        self.out[place] = (error, birth)
        self.failures.pop(place, None)
        return [Excluded(place, error.last_line)]

    # ---------------------------------------------------------------------------------------
    # The end

    def judge(self, now_s: float, is_whole: bool, patience_s: float) -> list[Action]:
        """What follows for whole nodes, and for the run. `is_whole`: every worker that is wanted
        has a process. Others may be on better nodes, so they are waited for, `patience_s` at most.
        """
        if not self.out or (self._judged == is_whole and self._agreed_s == inf):
            return []
        found: list[Action] = []
        for node, (birth, places) in sorted(self._nodes.items()) if is_whole else ():
            bad = [self.out[place][0] for place in sorted(places, key=str) if place in self.out]
            if len(bad) == len(places) and Place(node) not in self.out:
                found += self._exclude(Place(node), birth, bad[0])
        self._judged = is_whole
        gone = [node for node in sorted(self._nodes) if Place(node) in self.out]
        if 2 * len(gone) <= len(self._nodes):
            self._agreed_s = inf
            return found
        self._agreed_s = min(self._agreed_s, now_s)
        if is_whole or now_s >= self._agreed_s + patience_s:
            found.append(self._hopeless(gone, len(self._nodes)))
        return found

    def _hopeless(self, gone: list[str], of: int) -> Hopeless:
        """The sentence names what most of the nodes that are out share."""
        errors = [self.out[Place(node)][0] for node in gone]
        ((most, count),) = Counter(error.likeness for error in errors).most_common(1)
        error = next(error for error in errors if error.likeness == most)
        if of == 1:
            return Hopeless(error.text, error.is_refusal)
        names = ", ".join(gone[:8]) + (", .." if len(gone) > 8 else "")
        shared = "all of them say" if count == len(gone) else f"{count} of them say"
        if count == 1 < len(gone):
            shared = "they share no cause; one says"
        text = f"{len(gone)} of {of} nodes can make no shards ({names}); {shared}: {error.text}"
        return Hopeless(text, error.is_refusal)
