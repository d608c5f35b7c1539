"""What a training writes of itself: what it consumed, loss terms, speed, memory, spikes."""

import hashlib
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from distill.checkpoint.manifest import committed_steps
from distill.engine.engine import Engine
from distill.run import events, files, measured
from distill.training import callbacks, timing

# Of a loss that stands out: steps it is compared with, at most and at least; how far it stands out.
HISTORY, FEWEST, DEVIATIONS = 64, 16, 8.0


@dataclass(frozen=True)
class Flops:
    """What a training computes, by formula.

    Attributes:
        per_sample: FLOP of one sample in one step, the pass back included.
        peak_per_s: FLOP/s of the device of one rank at most, for comparison; 0 where unknown.
    """

    per_sample: float
    peak_per_s: float


class TrainLog(callbacks.Callback):
    """Writes events.jsonl and metrics.jsonl, on rank 0.

    A window is the steps between two lines of metrics.jsonl. What a save takes belongs to none.
    """

    def __init__(
        self, engine: Engine, run: files.RunDir, wait_s: Callable[[], float], flops: Flops | None
    ) -> None:
        """`wait_s()`: seconds spent waiting for data so far; `flops`: where a formula knows."""
        self._engine, self._run, self._wait_s, self._flops = engine, run, wait_s, flops
        self._clock: timing.PhaseClock | None = None  # until the first step begins
        self._since, self._waited = 0.0, 0.0  # when the window began, and `wait_s()` then
        self._first = 0
        self._ids: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        self._last: dict[str, Any] = {}
        self._names: list[str] = []
        self._history: deque[float] = deque(maxlen=HISTORY)

    def event(self, event: events.Event) -> None:
        """Appends to events.jsonl, on rank 0."""
        if self._engine.rank == 0:
            events.append(self._run, event)

    # -- Hooks

    def begin(self, done: int) -> None:
        self._first = done
        damaged = [step for step in committed_steps(self._run.checkpoints) if step > done]
        if damaged:  # newer ones did not verify
            self.event(events.Fallback(done, tuple(damaged)))
        self.event(events.Resume(done, self._engine.world_size))

    def enter(self, phase: str) -> None:
        if self._clock is None:
            self._clock = timing.PhaseClock(self._engine.device)
            self._begin_window()
        elif self._clock.phase == "save":
            self._begin_window()
        self._clock.enter(phase)

    def step(self, step: callbacks.Step) -> None:
        self._last = {"lr": step.lr, "grad_norm": step.grad_norm}
        if step.pulls:
            self._last["term_grad_norms"] = {n: float(value) for n, value in step.pulls.items()}
        self._names = list(step.terms)
        self._ids.append(step.batch.ids)
        self._rows.append(torch.stack([step.loss, *step.terms.values()]))

    def measure(self, done: int) -> dict[str, Any]:
        """Metrics of the window, which ends; none where it has no step. Writes its events."""
        if not self._ids:
            return {}
        engine = self._engine
        ids = engine.gather(torch.stack(self._ids)).cpu()  # [ranks, steps, share]
        values = engine.gather(torch.stack(self._rows)).cpu()  # [ranks, steps, 1 + terms]
        memory = engine.gather(torch.tensor(peak_memory_bytes(engine.device)))
        self._write_consumed(ids, done)
        self._write_spikes(ids, values[:, :, 0])
        loss, *terms = values.mean(dim=(0, 1)).tolist()
        metrics = {
            "loss": loss,
            "terms": dict(zip(self._names, terms, strict=True)),
            **self._last,
            **self._speed(ids.numel(), ids.shape[1]),
            "peak_memory_bytes": int(memory.max()),
            "world_size": engine.world_size,
        }
        self._first, self._ids, self._rows = done, [], []
        return metrics

    def record(self, done: int, metrics: dict[str, Any]) -> None:
        if self._engine.rank == 0:
            measured.append_metrics(self._run, measured.metrics_of(done, metrics))

    # -- Parts of a window

    def _begin_window(self) -> None:
        self._since, self._waited = time.monotonic(), self._wait_s()

    def _write_consumed(self, ids: torch.Tensor, done: int) -> None:
        """Proof of what the steps have read, whatever the number of ranks."""
        # Rank r holds the positions r, r + W, ..: put the global batches together again.
        whole = ids.permute(1, 2, 0).reshape(-1).numpy().astype("<i8")
        digest = hashlib.sha256(whole.tobytes()).hexdigest()
        self.event(events.Steps(self._first, done - 1, digest))

    def _write_spikes(self, ids: torch.Tensor, losses: torch.Tensor) -> None:
        """An event for each step whose loss stands out, with the ids where it is largest."""
        for index, loss in enumerate(losses.mean(dim=0).tolist()):
            if stands_out(loss, self._history):
                rank = int(losses[:, index].argmax())
                step, usual = self._first + index, median(self._history)
                found = tuple(ids[rank, index].tolist())
                self.event(events.Spike(step, loss, usual, rank, found))
            self._history.append(loss)

    def _speed(self, samples: int, steps: int) -> dict[str, Any]:
        """How fast the window was, and where its time went. The next one begins."""
        assert self._clock is not None
        phases, since, waited = self._clock.read(), self._since, self._waited
        self._begin_window()
        wall_s = self._since - since
        speed: dict[str, Any] = {
            "samples_per_s": samples / wall_s,
            "step_s": wall_s / steps,
            "phases_s": {name: seconds / steps for name, seconds in phases.items()},
            "data_wait_fraction": (self._waited - waited) / wall_s,
        }
        if self._flops is not None:
            achieved = self._flops.per_sample * samples / wall_s
            speed["flops_per_s"] = achieved
            if self._flops.peak_per_s > 0:
                speed["mfu"] = achieved / (self._engine.world_size * self._flops.peak_per_s)
        return speed


def stands_out(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss is a spike among those of the steps before it.

        loss > 2 m  and  loss > m + 8 d,   m = median(before),  d = 1.4826 median |before - m|

    d is the standard deviation where the noise is normal. Medians forgive earlier spikes. False
    while there are fewer than 16 steps to compare with.
    """
    if len(before) < FEWEST:
        return False
    middle = median(before)
    deviation = 1.4826 * median(abs(value - middle) for value in before)
    return loss > 2 * middle and loss > middle + DEVIATIONS * deviation


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes held at once so far: tensors on a GPU; on a CPU the whole process, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
