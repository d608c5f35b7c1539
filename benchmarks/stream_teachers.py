"""The pool of n local Ray workers against n bare solver loops without Ray, shards or ledger.

The teacher is that of `experiment=digits` in size, guidance and solver. A bare loop draws noise,
calls the solver and throws the states away. The pool is `bowstring generate`. Both run at the same
time and with the same priority, so whatever else the machine does slows both. What the pool's other
processes take (supervisor, Ray's daemons) slows both too, so it is measured apart: where n workers
leave no core free for it, it counts against the pool.

    ratio = pairs/s of the pool / pairs/s of the loops * (1 - max(0, n + rest - cores) / n)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.stream_page import markdown
from benchmarks.stream_run import Run, network
from distill.config import TeacherConfig
from distill.solvers import solve
from distill.teachers import build_field, build_teacher

SHARD, GRID = 256, 8  # samples, intervals of the grid
WINDOW_S, WINDOWS = 40.0, 3


def bare_loop(config: TeacherConfig, windows: int, barrier: Barrier, out: Any) -> None:
    """Puts the pairs per second of one process in every window, after a batch to warm up."""
    torch.set_num_threads(1)
    teacher = build_teacher(config, "cpu")
    field, image = build_field(teacher, config), teacher.image
    times = torch.linspace(0, 1, GRID + 1, dtype=torch.float64)

    def batch() -> None:
        noise = torch.randn(SHARD, *image.shape)
        label = torch.randint(image.num_classes, (SHARD,))

        def velocity(x: torch.Tensor, t: torch.Tensor) -> Any:
            return field(x, t.expand(len(x)), label)

        solve(velocity, noise, times, config.solver, config.steps // GRID)

    with torch.inference_mode():
        batch()
        for _ in range(windows):
            barrier.wait()
            began, pairs = time.perf_counter(), 0
            while time.perf_counter() - began < WINDOW_S:
                batch()
                pairs += SHARD
            out.put(pairs / (time.perf_counter() - began))


def rest_s(pool: psutil.Process) -> float:
    """Seconds of a core that the pool's processes have taken so far, the workers left out."""
    total = 0.0
    for process in [pool, *pool.children(recursive=True)]:
        if "TeacherWorker" not in " ".join(process.cmdline()):
            used = process.cpu_times()
            total += used.user + used.system
    return total


def side_by_side(folder: Path, teacher: list[str], workers: int, windows: int) -> dict[str, Any]:
    """Pairs per second of both in every window, and the cores that the rest of the pool takes."""
    run = Run(
        folder,
        [*teacher, f"cluster.teachers.num_workers={workers}", "train.max_steps=3520"],
    )
    process = run.start("generate", RAY_worker_niceness="0")
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(workers + 1), context.Queue()
    config = TeacherConfig(path=str(folder.parent / "teacher"), steps=16, guidance=1.5)
    loops = [
        context.Process(target=bare_loop, args=(config, windows, barrier, out))
        for _ in range(workers)
    ]
    for loop in loops:
        loop.start()
    while len(run.history().spans) < 2 * workers:
        if process.poll() is not None:
            run.finish(process)
        time.sleep(1)
    bare, spans, rest = [], [], []
    for _ in range(windows):
        barrier.wait()
        began, used = time.time(), rest_s(psutil.Process(process.pid))
        bare.append(sum(out.get() for _ in loops))
        spans.append((began, time.time()))
        rest.append((rest_s(psutil.Process(process.pid)) - used) / (spans[-1][1] - began))
    for loop in loops:
        loop.join()
    process.send_signal(signal.SIGTERM)
    run.finish(process)
    made = [run.history().shards_made(span) for span in spans]
    ours = [
        SHARD * float(after - before) / (end - began)
        for (before, after), (began, end) in zip(made, spans, strict=True)
    ]
    return {"pool_pairs_per_s": ours, "bare_pairs_per_s": bare, "rest_cores": rest}


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """A row for 1 and 2 workers."""
    teacher, cores = network(folder / "teacher"), os.cpu_count() or 1
    rows = []
    for workers in (1, 2):
        row = side_by_side(folder / str(workers), teacher, workers, 1 if quick else WINDOWS)
        rest = median(row["rest_cores"])
        share = 1 - max(0.0, workers + rest - cores) / workers
        ratios = [
            a / b * share
            for a, b in zip(row["pool_pairs_per_s"], row["bare_pairs_per_s"], strict=True)
        ]
        rows.append({"workers": workers, **row, "ratios": ratios, "ratio": median(ratios)})
    return {"shard": SHARD, "rows": rows}


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [
        [
            str(row["workers"]),
            f"{median(row['pool_pairs_per_s']):.1f}",
            f"{median(row['bare_pairs_per_s']):.1f}",
            f"{median(row['rest_cores']):.3f}",
            f"{row['ratio']:.3f} ({min(row['ratios']):.3f} to {max(row['ratios']):.3f})",
        ]
        for row in found["rows"]
    ]
    title = ["workers", "pool, pairs/s", "bare loops, pairs/s", "rest of the pool, cores", "ratio"]
    return (
        f"{markdown([title, *rows])}\n\n"
        f"Digits' teacher, {found['shard']} samples a shard. Both at the same time with the same "
        "priority; the rest of the pool counts where it has no core of its own. Median and range "
        f"of {len(found['rows'][0]['ratios'])} windows of {WINDOW_S:.0f} s. Bar: 0.95."
    )
