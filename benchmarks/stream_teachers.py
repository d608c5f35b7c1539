"""The pool of n local Ray workers against n bare solver loops without Ray, shards or ledger.

The teacher is that of `experiment=digits` in size, guidance and solver. A bare loop draws noise,
calls the solver and throws the states away. The pool is `bowstring generate`. Both count only while
all have work, so that start and end play no part. Rounds alternate; what counts is the median of
the ratios.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import defaultdict
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.stream_page import markdown
from benchmarks.stream_run import Run, network
from distill.config import TeacherConfig
from distill.rundir import read_lines
from distill.solvers import solve
from distill.teachers import build_field, build_teacher

SHARD, GRID, BLOCK = 256, 8, 8  # samples, intervals of the grid, shards


def bare_loop(config: TeacherConfig, batches: int, barrier: Barrier, out: Any) -> None:
    """Puts the pairs per second of one process after a batch to warm up."""
    torch.set_num_threads(1)
    teacher = build_teacher(config, "cpu")
    field, image = build_field(teacher, config), teacher.image
    times = torch.linspace(0, 1, GRID + 1, dtype=torch.float64)
    with torch.inference_mode():
        for batch in range(batches + 1):
            if batch == 1:
                barrier.wait()
                began = time.perf_counter()
            noise = torch.randn(SHARD, *image.shape)
            label = torch.randint(image.num_classes, (SHARD,))

            def velocity(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor = label) -> Any:
                return field(x, t.expand(len(x)), label)

            solve(velocity, noise, times, config.solver, config.steps // GRID)
    out.put(batches * SHARD / (time.perf_counter() - began))


def bare_pairs_per_s(config: TeacherConfig, workers: int, batches: int) -> float:
    """Of `workers` processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=bare_loop, args=(config, batches, barrier, out))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    speeds = [out.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sum(speeds)


def pool_pairs_per_s(folder: Path, teacher: list[str], workers: int) -> float:
    """Of the pool between the first shard of its last worker and the last one of its first."""
    run = Run(
        folder,
        [
            *teacher,
            f"cluster.teachers.num_workers={workers}",
            f"train.max_steps={176 * workers}",  # a block of 22 passes each, batch 256
        ],
    )
    run.finish(run.start("generate"))
    commits = defaultdict(list)
    for event in read_lines(run.files.events):
        if event["kind"] == "commit":
            commits[event["worker"]].append(event["time"])
    first, last = max(min(t) for t in commits.values()), min(max(t) for t in commits.values())
    made = run.history().shards_made([first, last])
    return SHARD * float(made[1] - made[0]) / (last - first)


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """A row for 1 and 2 workers."""
    teacher = network(folder / "teacher")
    config = TeacherConfig(path=str(folder / "teacher"), steps=16, guidance=1.5)
    rows = []
    for workers in (1, 2):
        bare, ours = [], []
        for index in range(1 if quick else 2):
            bare.append(bare_pairs_per_s(config, workers, BLOCK))
            place = folder / f"{workers}-{index}"
            ours.append(pool_pairs_per_s(place, teacher, workers))
        rows.append(
            {
                "workers": workers,
                "bare_pairs_per_s": bare,
                "pool_pairs_per_s": ours,
                "ratio": median(a / b for a, b in zip(ours, bare, strict=True)),
            }
        )
    return {"shard": SHARD, "rows": rows}


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [
        [
            str(row["workers"]),
            f"{median(row['pool_pairs_per_s']):.1f}",
            f"{median(row['bare_pairs_per_s']):.1f}",
            f"{row['ratio']:.3f}",
        ]
        for row in found["rows"]
    ]
    seconds = found["shard"] / median(found["rows"][0]["pool_pairs_per_s"])
    return (
        f"{markdown([['workers', 'pool, pairs/s', 'bare loops, pairs/s', 'ratio'], *rows])}\n\n"
        f"Digits' teacher, {found['shard']} samples a shard, {seconds:.1f} s each. Bar: 0.95."
    )
