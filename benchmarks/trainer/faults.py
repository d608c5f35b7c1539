"""A rank of the trainer is killed again and again: how soon it goes on, what is left of the time.

A run of `experiment=digits` on a closed-form teacher, one rank; kill -9 at fixed times, so also in
a start, should one take longer than the period, until ten recoveries were met by no other kill. A
recovery is the time from the kill to the first new step:

    detection   to the supervisor's `restart`
    restart     to `init`: processes, imports, process group, engine
    load        to `resume`: the checkpoint is verified and read
    step        to the first line of metrics.jsonl
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.sections import markdown
from benchmarks.stream.run import DEADLINE_S, Run, mixture
from cluster.supervisor.session import is_alive
from distill.report.cost import goodput
from distill.run.events import read_events, read_history
from distill.run.measured import last_step, read_metrics

RECOVERIES, PERIOD_S = 10, 60.0
# A start that takes longer than the period is killed too, and that is no reason to give up here.
SETTINGS = [
    "cluster.teachers.num_workers=1",
    "cluster.trainer.num_workers=1",
    "cluster.trainer.max_restarts=100",
]
# No run comes that far; saves and logs often enough to see what is lost.
STEPS = ["train.max_steps=100000", "train.save_every=20", "train.log_every=1"]
PARTS = ("restart", "init", "resume")  # kinds of events, in the order of a recovery


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """Recoveries of one run, and its goodput up to one period after the last kill."""
    wanted = 2 if quick else RECOVERIES
    teacher = mixture(folder / "mixture.json")
    run = Run(folder / "faults", [*teacher, *SETTINGS, *STEPS])
    supervisor = psutil.Process(run.start("distil").pid)
    killed = []
    try:
        while last_step(run.files.metrics) == 0:
            time.sleep(0.1)
            if not is_alive(supervisor):
                raise RuntimeError((run.files.root / "log.txt").read_text())
        time.sleep(PERIOD_S)
        while len(recoveries(run, killed)) < wanted and len(killed) < 2 * wanted:
            for rank in ranks_of(supervisor):
                rank.kill()
                killed.append(time.time())
            time.sleep(PERIOD_S)
        if not killed or not is_alive(supervisor):
            raise RuntimeError((run.files.root / "log.txt").read_text())
    finally:
        supervisor.terminate()
        supervisor.wait(DEADLINE_S)
    return {
        "kills": len(killed),
        "period_s": PERIOD_S,
        "goodput": goodput(read_history(run.files), read_metrics(run.files)),
        "recoveries": recoveries(run, killed),
    }


def ranks_of(supervisor: psutil.Process) -> list[psutil.Process]:
    """The trainer's ranks that are there now."""
    found = supervisor.children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


def recoveries(run: Run, killed: list[float]) -> list[dict[str, float]]:
    """Seconds of each part, for the kills whose recovery no other kill met."""
    events = list(read_events(run.files))
    steps = [line.time for line in read_metrics(run.files)]
    rows = []
    for start, end in pairwise([*killed, float("inf")]):
        times = [start]
        for kind in PARTS:
            times += [e.time for e in events if e.kind == kind and e.time > times[-1]][:1]
        times += [t for t in steps if t > times[-1]][:1]
        if len(times) == len(PARTS) + 2 and times[-1] < end:
            names = ("detection", "restart", "load", "step")
            parts = dict(zip(names, [b - a for a, b in pairwise(times)], strict=True))
            rows.append({**parts, "whole": times[-1] - start})
    return rows


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = found["recoveries"]
    table = [["part", "median, s", "worst, s"]]
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        table.append([name, f"{median(values):.2f}", f"{max(values):.2f}"])
    return (
        f"{markdown(table)}\n\nkill -9 of the only rank every {found['period_s']:g} s, "
        f"{found['kills']} times; {len(rows)} recoveries that no other kill met. Goodput "
        f"{found['goodput']:.2f}: useful step time over wall time."
    )
