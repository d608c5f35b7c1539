"""What hangs on the training loop: a class with the hooks it needs, given to `train`.

The hooks, in the order of a step, and who uses them:

    begin        before the first step              log, trackers, profiler, exporter
    enter        a phase of a step begins           log
    step         a step was taken                   log, profiler
    wants_save   is the state to be saved now?      checkpointer, exporter
    measure      what is there to record?           log
    record       these are the metrics              log, trackers
    save         the state is to be saved now       checkpointer
    saved        that was done                      exporter
    has_failed   did something in the background?   checkpointer
    wait         wait for it                        checkpointer
    close        the training has ended             trackers, checkpointer, profiler

The loop calls a hook of all callbacks before it calls the next hook. So what was done is on record
before it is saved, and saved before it is exported, in whatever order the callbacks stand.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.flow.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class Step:
    """A step that was taken, as this rank saw it. Tensors are detached.

    Attributes:
        index: its number, from 0.
        batch: this rank's part of the global batch.
        loss: mean over this rank's samples.
        terms: of the loss, by name, likewise.
        lr: its learning rate.
        grad_norm: global gradient norm before clipping, the same on every rank.
        pulls: norm of each weighted term's gradient at the last layer, likewise; of steps after
            which metrics are written, else empty.
    """

    index: int
    batch: TrajectoryBatch
    loss: Tensor
    terms: dict[str, Tensor]
    lr: float
    grad_norm: float
    pulls: dict[str, Tensor]


class Callback:
    """Hangs on the loop. A subclass overrides the hooks it needs; the others do nothing.

    Every hook is called on every rank, at the same steps, so it may call the engine's collectives.
    `done` counts steps: the state after `done` steps is what the engine holds at that moment.
    """

    def begin(self, done: int) -> None:
        """Training goes on after `done` steps."""

    def enter(self, phase: str) -> None:
        """What follows, up to the next call, is `phase` (`distill.training.timing.PHASES`)."""

    def step(self, step: Step) -> None:
        """A step was taken."""

    def wants_save(self, done: int) -> bool:
        """Whether the state is to be saved now. The same on every rank."""
        return False

    def measure(self, done: int) -> dict[str, Any]:
        """What there is to record: numbers by name, or such dictionaries of them.

        Asked every `train.log_every` steps and before every save.
        """
        return {}

    def record(self, done: int, metrics: dict[str, Any]) -> None:
        """Takes what all callbacks have measured."""

    def save(self, done: int) -> None:
        """Saves the state; it may go on in the background."""

    def saved(self, done: int) -> None:
        """All callbacks have saved, or do so in the background."""

    @property
    def has_failed(self) -> bool:
        """Whether something in the background has failed on this rank; `wait` says why."""
        return False

    def wait(self) -> None:
        """Waits for what goes on in the background. Raises on every rank if it failed on any."""

    def close(self) -> None:
        """The training has ended, well or not."""


class Everyone(Callback):
    """All callbacks of a training as one: each hook is passed on to all, in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = tuple(callbacks)

    def begin(self, done: int) -> None:
        for callback in self._all:
            callback.begin(done)

    def enter(self, phase: str) -> None:
        for callback in self._all:
            callback.enter(phase)

    def step(self, step: Step) -> None:
        for callback in self._all:
            callback.step(step)

    def wants_save(self, done: int) -> bool:
        return any([callback.wants_save(done) for callback in self._all])  # all are asked

    def measure(self, done: int) -> dict[str, Any]:
        return {k: v for callback in self._all for k, v in callback.measure(done).items()}

    def record(self, done: int, metrics: dict[str, Any]) -> None:
        for callback in self._all:
            callback.record(done, metrics)

    def save(self, done: int) -> None:
        for callback in self._all:
            callback.save(done)

    def saved(self, done: int) -> None:
        for callback in self._all:
            callback.saved(done)

    @property
    def has_failed(self) -> bool:
        return any(callback.has_failed for callback in self._all)

    def wait(self) -> None:
        for callback in self._all:
            callback.wait()

    def close(self) -> None:
        """Closes all, the last one first, also when one of them fails at it."""
        with ExitStack() as closing:
            for callback in self._all:
                closing.callback(callback.close)
