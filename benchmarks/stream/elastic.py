"""Teacher workers of a live run go from 1 to 4 to 2 at the command of another shell.

Two cores have no four teachers. So an evaluation takes a fixed time on a device that is not there
(a sleep) and nearly no computer: what is measured is how the pool follows. Each new number stands
for some leases; pairs per second count from the last worker's join, or leaving, to the next change.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.sections import markdown
from benchmarks.stream.run import DEADLINE_S, ROOT, Run, mixture
from distill.report.figures import worker_figure
from distill.report.sections import write_report
from distill.run.events import Commit, WorkerJoin, read_events

EVALUATION_S = 0.15  # 16 a shard
PICTURE = ROOT / "docs/benchmarks/stream_workers.png"
TARGETS = (1, 4, 2)


def wait_until(condition: Callable[[], bool]) -> None:
    """Looks ten times a second."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the pool does not follow")
        time.sleep(0.1)


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """How long the pool took to follow, and its speed at every number of workers."""
    leases = 2 if quick else 5
    run = Run(
        folder / "elastic",
        [
            *mixture(folder / "mixture.json"),
            "cluster.teachers.num_workers=1",
            "train.max_steps=10000",
        ],
    )
    supervisor = run.start("generate", EVALUATION_S)
    rows = []
    try:
        for target in TARGETS:
            asked = time.time()
            if target != TARGETS[0]:
                command = Path(sys.executable).with_name("bowstring")
                subprocess.run([command, "scale", run.files.root, str(target)], check=True)
            wait_until(lambda n=target: run.history().changes[-1:] and at_work(run) == (n, n))
            followed = run.history().changes[-1][0]
            wait_until(lambda n=target, t=followed: commits_after(run, t) >= n * leases)
            rows.append({"workers": target, "asked": asked, "followed": followed})
            rows[-1]["ended"] = time.time()
        # The shards that were in the making at the last moment belong to its speed.
        wait_until(lambda: commits_after(run, rows[-1]["ended"]) >= 2 * TARGETS[-1])
    finally:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(DEADLINE_S)
    write_report(run.files, "python benchmarks/stream.py elasticity")
    if not quick:
        figure = worker_figure(run.history(), run.config.trajectory.samples_per_shard)
        figure.savefig(PICTURE, dpi=110)
    lease_s = mean(end - start for start, end in run.history().spans)
    return {"lease_s": lease_s, "rows": [row | speeds(row, run, lease_s) for row in rows]}


def at_work(run: Run) -> tuple[int, int]:
    """Workers wanted and workers there."""
    return run.history().changes[-1][1:]


def commits_after(run: Run, since: float) -> int:
    """Shards committed after `since`."""
    return sum(end > since for _, end in run.history().spans)


def speeds(row: dict[str, Any], run: Run, lease_s: float) -> dict[str, Any]:
    """What only the whole log tells: pairs per second, and when the newest worker had made one."""
    size, since = run.config.trajectory.samples_per_shard, row["followed"]
    made = run.history().shards_made([since, row["ended"]])
    pairs_per_s = size * float(made[1] - made[0]) / (row["ended"] - since)
    events = list(read_events(run.files))
    newest = {e.worker for e in events if isinstance(e, WorkerJoin) and e.time == since}
    firsts = [e.time for e in events if isinstance(e, Commit) and e.worker in newest]
    return {
        "followed_s": since - row["asked"],
        "first_shard_s": firsts[0] - since if firsts else None,
        "pairs_per_s": pairs_per_s,
        "of_ideal": pairs_per_s * lease_s / (row["workers"] * size),
    }


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [
        [
            str(row["workers"]),
            f"{row['followed_s']:.1f} s",
            "-" if row["first_shard_s"] is None else f"{row['first_shard_s']:.1f} s",
            f"{row['pairs_per_s']:.0f}",
            f"{row['of_ideal']:.2f}",
        ]
        for row in found["rows"]
    ]
    head = ["workers", "until there", "first shard of the last", "pairs/s", "of workers / lease"]
    return (
        f"{markdown([head, *rows])}\n\nA lease takes {found['lease_s']:.2f} s. More workers are "
        "there when they have loaded their teachers, fewer when those that are too many have "
        "finished their shards.\n\n![Workers and pairs per second over time](stream_workers.png)"
    )
