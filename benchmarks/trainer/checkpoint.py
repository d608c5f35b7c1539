"""What a checkpoint costs, with and without `train.save_async`.

How long training stands still for it and by how much the steps beside it are slower, how many bytes
are written, and how long it takes to verify and to load them.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.sections import markdown
from benchmarks.trainer.cases import CASES, WARM_UP, new_engine, seconds_of, settings
from benchmarks.trainer.step import random_batch
from distill.checkpoint.commit import load_latest
from distill.checkpoint.manifest import latest_verified, verify
from distill.config import TrainConfig
from distill.engine.engine import MASTER
from distill.objectives.build import build_objective
from distill.objectives.config import ReflowConfig
from distill.run.events import Save
from distill.run.files import RunDir, write_atomic
from distill.testing import run_ranks
from distill.training.memory import keep_freed_memory
from distill.training.saving import Checkpointer

ROUNDS, STEPS_BESIDE = 5, 4  # saves of each kind, and steps while one is written
STALL_BAR, BYTES_BAR = 1.0, 1.1  # per cent of the time; bytes over the least there can be
LEAST_BYTES = 4 * (1 + 2 + 2)  # float32 of a weight: itself, Adam's two moments, two averages


def measure_rank(rank: int, world_size: int, folder: Path, rounds: int) -> dict[str, Any]:
    """`rounds` saves of the larger network of both kinds, in turn, with steps after each."""
    keep_freed_memory()
    case, checkpoints = CASES["25 M, few samples"], RunDir(folder).checkpoints
    engine = new_engine(case, settings(case, save_async=True))
    objective, batch, lr = build_objective(ReflowConfig(), 0), random_batch(case.batch), 1e-4
    saves: dict[str, list[Save]] = {"sync": [], "async": []}
    steps: dict[str, list[float]] = {"sync": [], "async": []}  # seconds of those after a save

    def take_step() -> None:
        loss = objective.loss(batch, engine.student, engine.target, 0).total
        engine.backward(loss, last=True)
        engine.step(0, lr)

    for _ in range(WARM_UP):
        take_step()
    for index in range(2 * rounds):
        kind = ("sync", "async")[index % 2]
        config = settings(case, save_async=kind == "async")
        saver = Checkpointer(checkpoints, engine, config, {}, saves[kind].append)
        saver.save(index + 1)
        steps[kind] += [seconds_of(take_step) for _ in range(STEPS_BESIDE)]
        saver.wait()
        saver.close()
    newest = latest_verified(checkpoints)
    assert newest is not None
    written, plain = saves["sync"][-1].bytes, checkpoints / "plain"
    weights = sum(f.data.numel() for f in engine.fragments() if f.kind == MASTER)
    step_s = median(steps["sync"])
    return {
        "weights": weights,
        "rounds": rounds,
        "bytes": written,
        "bytes_over_least": written / (LEAST_BYTES * weights),
        "step_s": step_s,
        "saves": {kind: cost_of(saves[kind], steps[kind], step_s) for kind in saves},
        "plain_write_s": median(
            seconds_of(lambda: write_atomic(plain, bytes(written))) for _ in range(3)
        ),
        "verify_s": median(seconds_of(lambda: verify(newest[1])) for _ in range(3)),
        "verify_and_load_s": median(
            seconds_of(lambda: load_latest(checkpoints, engine)) for _ in range(3)
        ),
    }


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """What saves cost; fewer of them when quick."""
    (found,) = run_ranks(measure_rank, 1, folder / "rank", folder, 2 if quick else ROUNDS)
    return found


def cost_of(saves: list[Save], steps: list[float], step_s: float) -> dict[str, float]:
    """Medians over saves, in seconds, and their share of the time at the default `save_every`.

    slower_s: by how much the steps after a save take longer than those with nothing beside them.
    """
    stall_s = median(save.stall_s for save in saves)
    after = [sum(steps[at : at + STEPS_BESIDE]) for at in range(0, len(steps), STEPS_BESIDE)]
    slower_s = median(after) - STEPS_BESIDE * step_s
    interval_s = TrainConfig().save_every * step_s
    return {
        "seconds": median(save.seconds for save in saves),
        "stall_s": stall_s,
        "stall_percent": 100 * stall_s / (interval_s + stall_s),
        "slower_s": slower_s,
        "slower_percent": 100 * slower_s / (interval_s + slower_s),
    }


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    every = TrainConfig().save_every
    head = ["save", "whole, s", "training stands still, s", f"share at save_every={every}"]
    table = [[*head, "steps beside it are slower by, s", "share"]]
    for kind, cost in found["saves"].items():
        stall = [f"{cost['stall_s']:.2f}", f"{cost['stall_percent']:.2f} %"]
        slower = [f"{cost['slower_s']:.2f}", f"{cost['slower_percent']:.2f} %"]
        table.append([kind, f"{cost['seconds']:.2f}", *stall, *slower])
    wrote, plain = f"{found['bytes']:,} bytes", f"{found['plain_write_s']:.2f} s"
    check, load = f"{found['verify_s']:.2f} s", f"{found['verify_and_load_s']:.2f} s"
    return (
        f"{markdown(table)}\n\n{found['weights']:,} weights, a step of {found['step_s']:.2f} s; "
        f"medians of {found['rounds']} saves of each kind, in turn. Bar of the stall: {STALL_BAR} "
        "%.\n\n"
        f"{wrote}, {found['bytes_over_least']:.4f} times the least there can be, which is "
        f"{LEAST_BYTES} per weight: itself, Adam's moments and two averages in float32. Bar: "
        f"{BYTES_BAR}. The same bytes alone, written and flushed: {plain}. To verify: {check}; to "
        f"verify and load: {load}, from the page cache."
    )
