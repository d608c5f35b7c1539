"""A run, whose trainer starts with the first block, against generate-then-train on the same work.

Both make the same shards with two teacher workers and train the same steps with two ranks, from
the start of the first process to the end of the last; evaluation is in neither. Teachers share the
two cores with the trainer, or stand for teachers on devices of their own: evaluations are sleeps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.sections import markdown
from benchmarks.stream.run import Run, mixture, network

BLOCKS = 2  # of 8 shards, 22 passes each: 176 steps
EVALUATION_S = 0.33  # on a device of its own; 16 a shard


def timed(folder: Path, settings: list[str], stages: list[str], seconds: float) -> dict[str, float]:
    """Total time of the stages, one process after the other, and time to the first gradient."""
    run = Run(folder, settings)
    began = time.perf_counter()
    for stage in stages:
        run.finish(run.start(stage, seconds))
    total = time.perf_counter() - began
    return {"total_s": total, "first_gradient_s": run.first_gradient_s()}


def compare(settings: list[str], seconds: float, folder: Path) -> dict[str, float]:
    """Both ways, one after the other, and the ratios."""
    ways = {"run": ["distil"], "then": ["generate", "train"]}
    found = {name: timed(folder / name, settings, ways[name], seconds) for name in ways}
    ratios = {f"{key}_ratio": found["run"][key] / found["then"][key] for key in found["run"]}
    return {f"{name}_{key}": row[key] for name, row in found.items() for key in row} | ratios


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """A row for teachers on the same cores, and one for teachers elsewhere."""
    blocks = 1 if quick else BLOCKS
    stream = ["block_shards=8", "passes=22", "spread=1"]  # so that all that is made is read
    work = [
        "objective=endpoint",
        f"train.max_steps={176 * blocks}",
        "train.log_every=1",
        *(f"trajectory.{setting}" for setting in stream),
    ]
    here, there = network(folder / "teacher"), mixture(folder / "mixture.json")
    return {
        "steps": 176 * blocks,
        "shards": 8 * blocks,
        "rows": [
            {"teachers": "same two cores", **compare([*work, *here], 0.0, folder / "here")},
            {
                "teachers": "devices of their own",
                **compare([*work, *there], EVALUATION_S, folder / "there"),
            },
        ],
    }


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [
        [
            row["teachers"],
            f"{row['run_total_s']:.0f} s",
            f"{row['then_total_s']:.0f} s",
            f"{row['total_s_ratio']:.2f}",
            f"{row['run_first_gradient_s']:.0f} s",
            f"{row['then_first_gradient_s']:.0f} s",
        ]
        for row in found["rows"]
    ]
    head = ["teachers", "run", "generate, then train", "ratio", "first gradient", "then"]
    return (
        f"{markdown([head, *rows])}\n\n{found['shards']} shards, {found['steps']} steps, each "
        "way once. Bar: a ratio below 1."
    )
