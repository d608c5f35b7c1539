"""`distill.training.loop` with DeepSpeedEngine, logs included, against a bare PyTorch loop.

The same step by both, in turn, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.sections import markdown
from benchmarks.trainer.cases import CASES, WARM_UP, Case, new_engine, seconds_of, settings
from benchmarks.trainer.step import IMAGE, random_batch
from distill.config import TrainConfig
from distill.engine.engine import frozen_copy, new_optimizer
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.build import build_network
from distill.objectives.build import build_objective
from distill.objectives.config import ReflowConfig
from distill.run.files import RunDir
from distill.testing import run_ranks
from distill.training.build import build_callbacks
from distill.training.loop import train
from distill.training.memory import keep_freed_memory

STAGES = (0, 1, 2)


def bare_step(case: Case, config: TrainConfig) -> Callable[[TrajectoryBatch], None]:
    """The same step by hand: loss, pass back, clipping, AdamW, two averages."""
    network = build_network(case.network, IMAGE, 0)
    averages = [frozen_copy(network) for _ in range(2)]
    names, weights = zip(
        *[(name, p) for name, p in network.named_parameters() if p.requires_grad], strict=True
    )
    values = [[average.get_parameter(name) for name in names] for average in averages]
    decays = (config.ema_target, config.ema_evaluation)
    optimizer = new_optimizer(network, config)
    for group in optimizer.param_groups:
        group["lr"] = config.lr
    objective = build_objective(ReflowConfig(), 0)

    def step(batch: TrajectoryBatch) -> None:
        objective.loss(batch, network, averages[0], 0).total.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, decay in zip(values, decays, strict=True):
                torch._foreach_lerp_(kept, weights, 1 - decay)

    return step


def compare(name: str, stage: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step of the loop over ZeRO and of the bare one, in turn.

    The bare step is taken while the loop reads. So a step of the loop is the time from where
    `read` is left to where it is entered again.
    """
    case = CASES[name]
    config = settings(case, zero_stage=stage, max_steps=WARM_UP + case.steps, save_every=10**6)
    engine, bare = new_engine(case, config), bare_step(case, config)
    batch = random_batch(case.batch)
    entered, left, theirs = [], [], []

    class Source:
        wait_s = 0.0

        def read(self, step: int) -> TrajectoryBatch:
            entered.append(time.perf_counter())
            theirs.append(seconds_of(lambda: bare(batch)))
            left.append(time.perf_counter())
            return batch

    callbacks = build_callbacks(engine, Source(), config, RunDir(folder), {})
    train(engine, Source(), build_objective(ReflowConfig(), 0), config, callbacks)
    ours = [
        end - start for start, end in zip(left[WARM_UP:-1], entered[WARM_UP + 1 :], strict=True)
    ]
    bares = theirs[WARM_UP + 1 :]
    ratio = median(a / b for a, b in zip(ours, bares, strict=True))
    times = {"loop_s": median(ours), "bare_s": median(bares)}
    return {"network": name, "zero_stage": stage, **times, "percent": 100 * (ratio - 1)}


def measure_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """All cases at every stage, on one rank, which keeps freed memory as one of a run does."""
    keep_freed_memory()
    rows = [compare(n, s, folder / f"{n}-{s}") for n in CASES for s in STAGES]
    return {"rows": rows}


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """Rows of networks and stages; it has no quicker way."""
    (found,) = run_ranks(measure_rank, 1, folder / "rank", folder)
    return found


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    table = [["network", "batch", "ZeRO stage", "loop, ms", "bare, ms", "slower", "bar"]]
    for row in found["rows"]:
        times = [f"{1e3 * row['loop_s']:.1f}", f"{1e3 * row['bare_s']:.1f}"]
        percent, bar = f"{row['percent']:+.1f} %", f"{CASES[row['network']].bar} %"
        sizes = [str(CASES[row["network"]].batch), str(row["zero_stage"])]
        table.append([row["network"], *sizes, *times, percent, bar])
    return (
        f"{markdown(table)}\n\nOne rank, one thread, reflow. Medians of the ratios of a step of "
        "each."
    )
