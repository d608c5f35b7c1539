"""The training loop, top to bottom: it counts, logs and saves, and knows no objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from distill.checkpoint.commit import load_latest, load_verified
from distill.checkpoint.saver import Saver
from distill.config import TrainConfig
from distill.engine.engine import Engine
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives.base import Objective
from distill.run.dir import RunDir
from distill.training.log import Losses, TrainLog, Work
from distill.training.timing import PhaseClock, traced_steps


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
    read: Callable[[int], TrajectoryBatch | None],
    objective: Objective,
    config: TrainConfig,
    run: RunDir,
    *,
    origin: dict[str, Any],
    wait_s: Callable[[], float],
    should_stop: Callable[[], bool],
    work: Work | None = None,
    start: int | None = None,
) -> int:
    """Steps done when it stopped: `config.max_steps`, or fewer when asked to stop.

    Resumes from the newest checkpoint that verifies. Who has just asked `agreed_latest` for it
    gives its step as `start`, and nothing is verified twice. `read(step)` gives this rank's part of
    global batch `step`, or None when it was told to stop while it waited for data; `wait_s()` the
    seconds spent waiting for data so far; `origin` is what manifests say of the run; `work` what a
    sample costs, if a formula knows. Collective: every rank calls it; rank 0 writes the logs.

    Raises:
        TrainingError: a loss or gradient is not finite; the state before that step is saved.
        SaveError: on every rank: a save failed on one of them, with its reason.
        CheckpointError: on every rank: no checkpoint can be opened.
    """
    accumulation = config.accumulation(engine.world_size)
    if start is None:
        start = load_latest(run.checkpoints, engine)
    else:
        load_verified(run.checkpoints, start, engine)
    saved = start
    with (
        TrainLog(engine, run, start, wait_s, work, config) as log,
        Saver(run.checkpoints, engine, config, origin, log.event) as saver,
        traced_steps(run.profile, start, engine.rank, config.profile) as traced,
    ):
        for step in range(start, config.max_steps):
            log.clock.enter("data")
            batch = read(step)
            if engine.any(batch is None):  # one rank may have waited, and another not
                if step > saved:
                    log.write(step)
                    saver.save(step)
                return step
            assert batch is not None
            batch, lr, overflowed = batch.to(engine.device), learning_rate(step, config), True
            while overflowed:  # fp16: the same step again, at a lower loss scale
                results = _accumulate(engine, objective, batch, accumulation, step, log.clock)
                finite = all(bool(torch.isfinite(result.total)) for result in results)
                mine = torch.tensor([not finite, should_stop(), saver.has_failed])
                flags = engine.gather(mine).any(dim=0)
                grad_norm = math.nan if flags[0] else engine.step(step, lr)
                overflowed = engine.overflowed and not flags[0]
            log.clock.enter("other")
            if flags[2]:
                saver.wait()  # raises, on every rank
            if not math.isfinite(grad_norm):  # on every rank; nothing was applied
                log.write(step)
                saver.save(step)
                saver.wait()
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
                log.clock.enter("save")
                saver.save(done)
                saved = done
                log.skip_save()
            traced()
            if stop:
                return done
    return max(start, config.max_steps)


def _accumulate(
    engine: Engine,
    objective: Objective,
    batch: TrajectoryBatch,
    accumulation: int,
    step: int,
    clock: PhaseClock,
) -> list[Losses]:
    """Losses of the micro-batches of a step; their gradients are in the engine."""
    results: list[Losses] = []
    for micro in batch.split(accumulation):
        clock.enter("forward")
        result = objective.loss(micro, engine.student, engine.target, step)
        results.append(Losses.of(result))
        clock.enter("backward")
        engine.backward(result.total, last=len(results) == accumulation)
    clock.enter("optimizer")
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
