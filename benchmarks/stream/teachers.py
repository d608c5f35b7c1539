"""The pool of n local Ray workers against n bare solver loops without Ray, shards or ledger.

The teacher is that of `experiment=digits` in size, guidance and solver. A bare loop draws noise,
calls the solver and throws the states away. Like a worker it keeps freed memory, which takes chance
out of it (`distill.training.memory`), and has the low priority of Ray's workers. The pool is
`bowstring generate`, all its processes. Both live through the whole measurement and take turns of a
few seconds: whoever has no turn is stopped (SIGSTOP). So a machine that is faster in one minute
than in the next favours neither.

    ratio = (pairs / seconds of its turns) of the pool / the same of the loops
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import defaultdict
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from benchmarks.sections import markdown
from benchmarks.stream.run import DEADLINE_S, Run, network
from distill.flow.solvers import solve
from distill.run.events import Commit, read_events
from distill.teachers.build import build_field, build_teacher
from distill.teachers.config import NativeConfig, TeacherConfig
from distill.training.memory import keep_freed_memory

SHARD, GRID = 256, 8  # samples, intervals of the grid
RAY_NICENESS = 15  # of its workers, unless RAY_worker_niceness says another
TURN_S, TURNS = 8.0, 10  # of each; a lease bears far longer stops


def bare_loop(config: TeacherConfig, ready: Barrier, over: Event, out: Queue[list[float]]) -> None:
    """Puts the time at the end of every batch, after one to warm up."""
    os.nice(RAY_NICENESS)
    keep_freed_memory()
    torch.set_num_threads(1)
    teacher = build_teacher(config, "cpu")
    field, image = build_field(teacher, config), teacher.image
    times = torch.linspace(0, 1, GRID + 1, dtype=torch.float64)
    ends = []
    with torch.inference_mode():
        while not over.is_set():
            noise = torch.randn(SHARD, *image.shape)
            label = torch.randint(image.num_classes, (SHARD,))

            def velocity(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor = label) -> Any:
                return field(x, t.expand(len(x)), label)

            solve(velocity, noise, times, config.solver, config.steps // GRID)
            if not ends:
                ready.wait()
            ends.append(time.time())
    out.put(ends)


class Loops(NamedTuple):
    """Processes with a bare loop each."""

    pids: list[int]
    over: Event
    ends: Queue[list[float]]


def start_loops(config: TeacherConfig, workers: int) -> Loops:
    """Loops that are warm when this returns."""
    context = multiprocessing.get_context("spawn")
    ready, over = context.Barrier(workers + 1), context.Event()
    ends: Queue[list[float]] = context.Queue()
    pids = []
    for _ in range(workers):
        loop = context.Process(target=bare_loop, args=(config, ready, over, ends), daemon=True)
        loop.start()
        pids.append(loop.ident)
    ready.wait()
    return Loops(pids, over, ends)


def signal_all(pids: list[int], what: signal.Signals) -> None:
    """Signals processes and all below them: of the pool the supervisor, Ray's daemons, workers."""
    for root in map(psutil.Process, pids):
        for process in [root, *root.children(recursive=True)]:
            process.send_signal(what)


def take_turn(pids: list[int]) -> tuple[float, float]:
    """Lets stopped processes run for a turn, and tells when."""
    began = time.time()
    signal_all(pids, signal.SIGCONT)
    time.sleep(TURN_S)
    signal_all(pids, signal.SIGSTOP)
    return began, time.time()


def rate(ends: list[float], turns: list[tuple[float, float]]) -> float:
    """Pairs per second of its turns, from the end of its first batch in them to that of its last.

    A batch that a stop fell into counts with the time it had.
    """
    edges = np.array(turns).ravel()
    had = np.cumsum([0.0, *(np.diff(edges) * (np.arange(len(edges) - 1) % 2 == 0))])
    inside = [end for end in ends if edges[0] <= end <= edges[-1]]
    began, ended = np.interp([inside[0], inside[-1]], edges, had)
    return float(SHARD * (len(inside) - 1) / (ended - began))


def measure_row(folder: Path, teacher: list[str], workers: int, turns: int) -> dict[str, Any]:
    """Pairs per second of `workers` loops and of a pool of as many."""
    run = Run(folder, [*teacher, f"cluster.teachers.num_workers={workers}", "train.max_steps=7040"])
    supervisor = run.start("generate")
    while len(commits(run)) < workers:
        if supervisor.poll() is not None:
            run.finish(supervisor)
        time.sleep(1)
    signal_all([supervisor.pid], signal.SIGSTOP)
    config = NativeConfig(path=str(folder.parent / "teacher"), steps=16, guidance=1.5)
    loops = start_loops(config, workers)
    signal_all(loops.pids, signal.SIGSTOP)
    loops_turns, pool_turns = [], []
    for _ in range(turns):
        loops_turns.append(take_turn(loops.pids))
        pool_turns.append(take_turn([supervisor.pid]))
    loops.over.set()
    signal_all([*loops.pids, supervisor.pid], signal.SIGCONT)
    bare = [rate(loops.ends.get(timeout=DEADLINE_S), loops_turns) for _ in loops.pids]
    supervisor.send_signal(signal.SIGTERM)
    run.finish(supervisor)
    ours = [rate(ends, pool_turns) for ends in commits(run).values()]
    return {
        "workers": workers,
        "bare_pairs_per_s": sum(bare),
        "pool_pairs_per_s": sum(ours),
        "ratio": sum(ours) / sum(bare),
    }


def commits(run: Run) -> dict[str, list[float]]:
    """When every worker's shards were committed."""
    found = defaultdict(list)
    for event in read_events(run.files):
        if isinstance(event, Commit):
            found[event.worker].append(event.time)
    return found


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """A row for 1 and 2 workers."""
    teacher, turns = network(folder / "teacher"), TURNS // 2 if quick else TURNS
    rows = [measure_row(folder / str(n), teacher, n, turns) for n in (1, 2)]
    return {"shard": SHARD, "rows": rows}


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [
        [
            str(row["workers"]),
            f"{row['pool_pairs_per_s']:.1f}",
            f"{row['bare_pairs_per_s']:.1f}",
            f"{row['ratio']:.3f}",
        ]
        for row in found["rows"]
    ]
    seconds = found["shard"] / found["rows"][0]["pool_pairs_per_s"]
    return (
        f"{markdown([['workers', 'pool, pairs/s', 'bare loops, pairs/s', 'ratio'], *rows])}\n\n"
        f"Digits' teacher, {found['shard']} samples a shard, {seconds:.1f} s each. Bar: 0.95."
    )
