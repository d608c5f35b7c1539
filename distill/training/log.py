"""What a training writes of itself: what it consumed, loss terms, speed, memory, spikes."""

from __future__ import annotations

import hashlib
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from distill.checkpoint.manifest import committed_steps
from distill.config import TrainConfig
from distill.engine.engine import Engine
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives.base import LossTerms
from distill.run.dir import RunDir
from distill.run.files import append_line
from distill.training.timing import PhaseClock
from distill.training.trackers import EventFile, WandbRun, scalars

# Of a loss that stands out: steps it is compared with, at most and at least; how far it stands out.
HISTORY, FEWEST, DEVIATIONS = 64, 16, 8.0


@dataclass(frozen=True)
class Work:
    """What a training costs by formula.

    Attributes:
        flops_per_sample: of one sample in one step, the pass back included.
        peak_flops: FLOP/s of the device of one rank at most, for comparison; 0 where unknown.
    """

    flops_per_sample: float
    peak_flops: float


@dataclass(frozen=True)
class Losses:
    """Values of one micro-batch's loss, detached so that no graph outlives its step."""

    total: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def of(cls, result: LossTerms) -> Losses:
        """The values of `result`."""
        terms = {name: value.detach() for name, value in result.terms.items()}
        return cls(result.total.detach(), terms)


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


class TrainLog:
    """Writes events.jsonl, metrics.jsonl and its copies, on rank 0.

    Attributes:
        clock: to be told which phase of a step begins.
    """

    def __init__(
        self,
        engine: Engine,
        run: RunDir,
        start: int,
        wait_s: Callable[[], float],
        work: Work | None,
        config: TrainConfig,
    ) -> None:
        self._engine, self._run, self._wait_s, self._work = engine, run, wait_s, work
        self._first = start
        self._since, self._waited = time.monotonic(), wait_s()
        self._ids: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._names: list[str] = []
        self._last: dict[str, float] = {}
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._copies: list[EventFile | WandbRun] = []
        if engine.rank == 0:
            self._copies.append(EventFile(run.tensorboard, start))
            if config.wandb:
                self._copies.append(WandbRun(config.wandb, run, asdict(config), self.event))
        self.clock = PhaseClock(engine.device)
        damaged = [step for step in committed_steps(run.checkpoints) if step > start]
        if damaged:  # newer ones did not verify
            self.event({"kind": "fallback", "step": start, "damaged": damaged})
        self.event({"kind": "resume", "step": start, "world_size": engine.world_size})

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        for copy in self._copies:
            copy.close()

    def event(self, record: dict[str, Any]) -> None:
        """Appends to events.jsonl, on rank 0."""
        if self._engine.rank == 0:
            append_line(self._run.events, record)

    def skip_save(self) -> None:
        """To be called after a save: the time it took belongs to no window of steps."""
        self.clock.enter("other")
        self._since, self._waited = time.monotonic(), self._wait_s()

    def add(
        self, batch: TrajectoryBatch, results: list[Losses], lr: float, grad_norm: float
    ) -> None:
        """Takes in one step."""
        self._last = {"lr": lr, "grad_norm": grad_norm}
        self._names = list(results[0].terms)
        self._ids.append(batch.ids.cpu())
        rows = [torch.stack([r.total, *r.terms.values()]).float() for r in results]
        self._rows.append(torch.stack(rows).mean(dim=0))

    def write(self, done: int) -> None:
        """Writes the steps since the last call, if there are any. Collective."""
        if not self._ids:
            return
        ids = self._engine.gather(torch.stack(self._ids))  # [ranks, steps, share]
        values = self._engine.gather(torch.stack(self._rows)).cpu()  # [ranks, steps, 1 + terms]
        memory = self._engine.gather(torch.tensor(peak_memory_bytes(self._engine.device)))
        phases = self.clock.read()
        if self._engine.rank == 0:
            self._consumed(ids, done)
            self._name_spikes(ids, values[:, :, 0])
            speed = self._speed(ids.numel(), ids.shape[1], phases)
            self._metrics(done, values, speed | {"peak_memory_bytes": int(memory.max())})
        self._first, self._ids, self._rows = done, [], []

    def _consumed(self, ids: Tensor, done: int) -> None:
        """Proof of what the steps have read, whatever the number of ranks."""
        # Rank r holds the positions r, r + W, ..: put the global batches together again.
        whole = ids.permute(1, 2, 0).reshape(-1).numpy().astype("<i8")
        digest = hashlib.sha256(whole.tobytes()).hexdigest()
        self.event({"kind": "steps", "first": self._first, "last": done - 1, "ids_sha256": digest})

    def _name_spikes(self, ids: Tensor, losses: Tensor) -> None:
        """An event for each step whose loss stands out, with the ids where it is largest."""
        for index, loss in enumerate(losses.mean(dim=0).tolist()):
            if stands_out(loss, self._history):
                rank = int(losses[:, index].argmax())
                spike = {"loss": loss, "median": median(self._history), "rank": rank}
                found = ids[rank, index].tolist()
                self.event({"kind": "spike", "step": self._first + index, **spike, "ids": found})
            self._history.append(loss)

    def _speed(self, samples: int, steps: int, phases: dict[str, float]) -> dict[str, Any]:
        """How fast the last `steps` were, and where their time went."""
        now, waited = time.monotonic(), self._wait_s()
        wall, waited_s = now - self._since, waited - self._waited
        self._since, self._waited = now, waited
        speed: dict[str, Any] = {
            "samples_per_s": samples / wall,
            "step_s": wall / steps,
            "phases_s": {name: seconds / steps for name, seconds in phases.items()},
            "data_wait_fraction": waited_s / wall,
        }
        if self._work is not None:
            achieved = self._work.flops_per_sample * samples / wall
            speed["flops_per_s"] = achieved
            if self._work.peak_flops > 0:
                speed["mfu"] = achieved / (self._engine.world_size * self._work.peak_flops)
        return speed

    def _metrics(self, done: int, values: Tensor, speed: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same for its copies."""
        means = values.mean(dim=(0, 1)).tolist()
        metrics = {
            "step": done,
            "loss": means[0],
            "terms": dict(zip(self._names, means[1:], strict=True)),
            **self._last,
            **speed,
            "world_size": self._engine.world_size,
        }
        append_line(self._run.metrics, metrics)
        numbers = dict(scalars(metrics))
        for copy in self._copies:
            copy.write(done, numbers)
