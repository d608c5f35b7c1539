"""The training loop, top to bottom: it counts, logs and saves, and knows no objective."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill import checkpoint
from distill.config import TrainConfig
from distill.engine import Engine
from distill.manifest import committed_steps
from distill.objectives.base import LossTerms, Objective
from distill.rundir import RunDir, append_line
from distill.trajectory import TrajectoryBatch


class TrainingError(RuntimeError):
    """The loss or its gradient is not finite. The message names the step, the term and the ids."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.decay == "constant":
        return config.lr * warmup
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def train(
    engine: Engine,
    read: Callable[[int], TrajectoryBatch],
    objective: Objective,
    config: TrainConfig,
    run: RunDir,
    *,
    origin: dict[str, Any],
    wait_s: Callable[[], float],
    should_stop: Callable[[], bool],
) -> int:
    """Steps done when it stopped: `config.max_steps`, or fewer when asked to stop.

    Resumes from the newest checkpoint that verifies. `read(step)` gives this rank's part of global
    batch `step`; `wait_s()` the seconds spent waiting for data so far; `origin` is what manifests
    say of the run. Collective: every rank of the engine calls it; rank 0 writes the logs.

    Raises:
        TrainingError: a loss or gradient is not finite; the state before that step is saved.
    """
    accumulation = config.accumulation(engine.world_size)
    start = checkpoint.load_latest(run.checkpoints, engine)
    log = TrainLog(engine, run, start, wait_s)
    for step in range(start, config.max_steps):
        batch, lr, overflowed = read(step).to(engine.device), learning_rate(step, config), True
        while overflowed:  # fp16: the same step again, at a lower loss scale
            results = _accumulate(engine, objective, batch, accumulation, step)
            finite = all(bool(torch.isfinite(result.total)) for result in results)
            flags = engine.gather(torch.tensor([not finite, should_stop()])).any(dim=0)
            grad_norm = math.nan if flags[0] else engine.step(step, lr)
            overflowed = engine.overflowed and not flags[0]
        if not math.isfinite(grad_norm):  # on every rank; nothing was applied
            log.write(step)
            checkpoint.save(run.checkpoints, step, engine, config.keep_last, origin)
            what = "loss" if flags[0] else "gradient"
            raise TrainingError(
                f"step {step}: the {what} is not finite: "
                + _find_failure(engine, objective, batch, accumulation, step)
            )

        done, stop = step + 1, bool(flags[1])
        log.add(batch, results, lr, grad_norm)
        due = stop or done % config.save_every == 0 or done == config.max_steps
        if due or done % config.log_every == 0:
            log.write(done)
        if due:
            checkpoint.save(run.checkpoints, done, engine, config.keep_last, origin)
            log.saved(done)
        if stop:
            return done
    return max(start, config.max_steps)


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


def _accumulate(
    engine: Engine, objective: Objective, batch: TrajectoryBatch, accumulation: int, step: int
) -> list[Losses]:
    """Losses of the micro-batches of a step; their gradients are in the engine."""
    results: list[Losses] = []
    for micro in batch.split(accumulation):
        result = objective.loss(micro, engine.student, engine.target, step)
        results.append(Losses.of(result))
        engine.backward(result.total, last=len(results) == accumulation)
    return results


def _find_failure(
    engine: Engine, objective: Objective, batch: TrajectoryBatch, accumulation: int, step: int
) -> str:
    """Ranks, terms and sample ids that make a step fail, found by computing its loss again.

    The same sentence on every rank. Collective.
    """
    names: list[str] = []
    rows = []
    for micro in batch.split(accumulation):
        terms = objective.loss(micro, engine.student, engine.target, step).terms
        names = list(terms)
        values = [not bool(torch.isfinite(term)) for term in terms.values()]
        gradients = [not engine.has_finite_gradient(term) for term in terms.values()]
        rows.append(torch.tensor([values, gradients]))
    bad = engine.gather(torch.stack(rows).any(dim=0))  # [ranks, value or gradient, terms]
    found = []
    for rank, ids in enumerate(engine.gather(batch.ids).tolist()):
        for what, flags in zip(("", "the gradients of "), bad[rank], strict=True):
            if flags.any():
                terms_here = [name for name, flag in zip(names, flags, strict=True) if flag]
                found.append(f"on rank {rank} {what}terms {terms_here} are not, sample ids {ids}")
                break  # a value that is not finite has no gradient
    unknown = (
        f"each term and its gradient is, a weight or a sum is not, sample ids {batch.ids.tolist()}"
    )
    return "; ".join(found) or unknown


class TrainLog:
    """What rank 0 writes of a run: loss terms and speed, and proof of what was consumed."""

    def __init__(
        self, engine: Engine, run: RunDir, start: int, wait_s: Callable[[], float]
    ) -> None:
        self._engine, self._run, self._wait_s = engine, run, wait_s
        self._first = start
        self._since, self._waited = time.monotonic(), wait_s()
        self._ids: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._names: list[str] = []
        self._last: dict[str, float] = {}
        damaged = [step for step in committed_steps(run.checkpoints) if step > start]
        if damaged:  # newer ones did not verify
            self.event({"kind": "fallback", "step": start, "damaged": damaged})
        self.event({"kind": "resume", "step": start, "world_size": engine.world_size})

    def event(self, record: dict[str, Any]) -> None:
        """Appends to events.jsonl, on rank 0."""
        if self._engine.rank == 0:
            append_line(self._run.events, record)

    def saved(self, done: int) -> None:
        """Notes a checkpoint. The time it took belongs to no window of steps."""
        self.event({"kind": "save", "step": done})
        self._since, self._waited = time.monotonic(), self._wait_s()

    def add(
        self, batch: TrajectoryBatch, results: list[Losses], lr: float, grad_norm: float
    ) -> None:
        """Takes in one step."""
        self._last = {"lr": lr, "grad_norm": grad_norm}
        self._names = list(results[0].terms)
        self._ids.append(batch.ids.cpu())
        rows = [torch.stack([r.total, *r.terms.values()]).float() for r in results]
        self._sums.append(torch.stack(rows).mean(dim=0))

    def write(self, done: int) -> None:
        """Writes the steps since the last call, if there are any. Collective."""
        if not self._ids:
            return
        # Rank r holds the positions r, r + W, ..: put the global batches together again.
        ids = self._engine.gather(torch.stack(self._ids)).permute(1, 2, 0).reshape(-1)
        values = self._engine.gather(torch.stack(self._sums).mean(dim=0)).mean(dim=0).tolist()
        now, waited = time.monotonic(), self._wait_s()
        wall = now - self._since
        self.event(
            {
                "kind": "steps",
                "first": self._first,
                "last": done - 1,
                "ids_sha256": hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
            }
        )
        if self._engine.rank == 0:
            metrics = {
                "step": done,
                "loss": values[0],
                "terms": dict(zip(self._names, values[1:], strict=True)),
                **self._last,
                "samples_per_s": len(ids) / wall,
                "step_s": wall / len(self._ids),
                "data_wait_fraction": (waited - self._waited) / wall,
                "world_size": self._engine.world_size,
            }
            append_line(self._run.metrics, metrics)
        self._first, self._since, self._waited = done, now, waited
        self._ids, self._sums = [], []
