"""The training loop, top to bottom. It knows no objective, and nothing of what hangs on it."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Protocol, runtime_checkable

import torch

from distill.config import TrainConfig
from distill.engine.engine import Engine
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives.base import Objective
from distill.training.callbacks import Callback, Everyone, Step


class TrainingError(RuntimeError):
    """The loss or its gradient is not finite. The message names the step, the term and the ids."""


@runtime_checkable
class Source(Protocol):
    """Where a rank's batches come from."""

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data so far."""

    def read(self, step: int) -> TrajectoryBatch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.decay == "constant":
        return config.lr * warmup
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def train(
    engine: Engine,
    source: Source,
    objective: Objective,
    config: TrainConfig,
    callbacks: Sequence[Callback] = (),
    *,
    start: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Steps done when it stopped: `config.max_steps`, or fewer when asked to stop.

    The engine holds the state after `start` steps (`distill.checkpoint.commit.load_latest`). When
    `should_stop` says so on one rank, all save and stop after the same step. Collective: every rank
    calls it, each with callbacks of its own.

    Raises:
        TrainingError: a loss or gradient is not finite; the state before that step is saved.
        SaveError: on every rank: a save failed on one of them, with its reason.
    """
    accumulation = config.accumulation(engine.world_size)
    with closing(Everyone(callbacks)) as hooks:
        hooks.begin(start)
        done, saved, stop = start, start, False
        while done < config.max_steps and not stop:
            hooks.enter("data")
            batch = source.read(done)
            if engine.any(batch is None):  # one rank may have waited, and another not
                if done > saved:
                    _save(hooks, done)
                break
            assert batch is not None
            batch, lr, overflowed = batch.to(engine.device), learning_rate(done, config), True
            while overflowed:  # fp16: the same step again, at a lower loss scale
                is_logged = (done + 1) % config.log_every == 0
                loss, terms, pulls = _accumulate(
                    engine, objective, batch, accumulation, done, hooks, is_logged
                )
                told = torch.tensor([should_stop(), hooks.has_failed])
                told = told.to(loss.device, non_blocking=True)
                mine = torch.cat([~torch.isfinite(loss)[None], told])  # the device is read once
                broken, stop, failed = engine.gather(mine).any(dim=0).tolist()
                grad_norm = math.nan if broken else engine.step(done, lr)
                overflowed = engine.overflowed and not broken
            hooks.enter("other")
            if failed:
                hooks.wait()  # raises, on every rank
            if not math.isfinite(grad_norm):  # on every rank; nothing was applied
                _save(hooks, done)
                hooks.wait()
                what = "loss" if broken else "gradient"
                found = _find_failure(engine, objective, batch, accumulation, done)
                raise TrainingError(f"step {done}: the {what} is not finite: {found}")

            hooks.step(Step(done, batch, loss, terms, lr, grad_norm, pulls))
            done += 1
            if stop or hooks.wants_save(done):
                _save(hooks, done)
                saved = done
            elif done % config.log_every == 0:
                _record(hooks, done)
        hooks.wait()
        return done


def _accumulate(
    engine: Engine,
    objective: Objective,
    batch: TrajectoryBatch,
    accumulation: int,
    step: int,
    hooks: Callback,
    is_logged: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss and terms of a step, means over its micro-batches; their gradients are in the engine.

    Of a step that `is_logged` also how hard each weighted term pulls, in its first micro-batch: a
    pass back through the last layer alone. The values are detached, so that no graph outlives its
    micro-batch.
    """
    names: list[str] = []
    rows: list[torch.Tensor] = []
    pulls: dict[str, torch.Tensor] = {}
    for micro in batch.split(accumulation):
        hooks.enter("forward")
        result = objective.loss(micro, engine.student, engine.target, step)
        total = result.total
        names = list(result.terms)
        rows.append(torch.stack([total, *result.terms.values()]).detach().float())
        hooks.enter("backward")
        if is_logged and not pulls:
            weighted = [result.weights[name] * term for name, term in result.terms.items()]
            pulls = dict(zip(names, engine.gradient_norms(weighted), strict=True))
        engine.backward(total, last=len(rows) == accumulation)
    hooks.enter("optimizer")
    loss, *terms = torch.stack(rows).mean(dim=0)
    return loss, dict(zip(names, terms, strict=True)), pulls


def _record(hooks: Callback, done: int) -> None:
    metrics = hooks.measure(done)
    if metrics:
        hooks.record(done, metrics)


def _save(hooks: Callback, done: int) -> None:
    """Saves, and records before that: a checkpoint must not be ahead of the record of its data."""
    _record(hooks, done)
    hooks.enter("save")
    hooks.save(done)
    hooks.saved(done)
    hooks.enter("other")


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
