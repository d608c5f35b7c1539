"""Seconds from what is done to a run on Slurm to what follows, in rounds of one run each.

A round: submit; a second node of teachers; that node loses its power; a warning to the trainer,
which saves and is queued again; the head's node loses its power.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.sections import markdown
from benchmarks.slurm.cluster import BAD_ENDS, Case, Cluster

ROUNDS = 5
LOST_S, DELAY_S = 10.0, 5.0  # SlurmdTimeout and cred_expire of tests/slurm/minislurm.sh
# No run comes to its end here, or saves without a signal.
SETTINGS = [
    "train.max_steps=100000",
    "train.save_every=100000",
    "cluster.slurm.train.time='1:00:00'",
    "cluster.slurm.teachers.time='1:00:00'",
    "cluster.slurm.train.options=[--exclusive]",
    "cluster.slurm.teachers.options=[--exclusive]",  # a node of its own for each worker
    "cluster.slurm.teachers.nodes=1",
]


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """Seconds by what is measured, one per round; and the load at the end of each round."""
    cluster = Cluster(folder / "slurm")
    seconds: dict[str, list[float]] = defaultdict(list)
    load = []
    with cluster.started():
        for n in range(2 if quick else ROUNDS):
            place = folder / str(n)
            place.mkdir()
            case = Case(cluster, place, *SETTINGS)
            try:
                for name, value in one_round(case).items():
                    seconds[name].append(round(value, 2))
            finally:
                case.close()
            load.append(round(os.getloadavg()[1], 1))
            print(f"round {n + 1}: {seconds}, load {load[-1]}", flush=True)
    return {"seconds": dict(seconds), "load": load}


def one_round(case: Case) -> dict[str, float]:
    """Seconds of one run, by what is measured."""
    found = {}
    since = time.time()
    case.submit()
    found["submit to the first step"] = wait(case, next_step, since)

    (old,) = case.teacher_nodes
    since = time.time()
    case.bowstring("scale", str(case.run.root), "2")
    found["`scale` to the first shard of the new worker"] = wait(case, new_shard, since)

    (new,) = {*case.teacher_nodes} - {old}
    since = time.time()
    case.power_off(new)
    found["teachers' node lost to the first shard of its replacement"] = wait(
        case, new_shard, since
    )
    case.power_on()  # the trainer needs a node without teachers below

    since = time.time()
    case.tell("scancel", "--batch", "--signal=TERM", case.train.id)
    found["signal to saved"] = wait(case, next_save, since)
    case.until(lambda: case.train.restarts == 1, *BAD_ENDS)
    found["queued again to the next step"] = wait(case, next_step, time.time())

    since = time.time()
    case.power_off(case.train.node_list)
    case.until(lambda: case.train.restarts == 2, *BAD_ENDS)
    found["head's node lost to queued again"] = time.time() - since
    case.until(lambda: len(case.events("resume", since)) > 0, *BAD_ENDS)
    resumed = case.events("resume", since)[0]["time"]  # a last step may follow the power's end
    found["head's node lost to the next step"] = resumed - since + wait(case, next_step, resumed)
    return found


Moment = Callable[[Case, float], float | None]


def wait(case: Case, moment: Moment, since: float) -> float:
    """Seconds from `since` to the first moment of a kind after it; waits for it."""
    case.until(lambda: moment(case, since) is not None, *BAD_ENDS)
    found = moment(case, since)
    assert found is not None
    return found - since


def next_step(case: Case, since: float) -> float | None:
    """When the first step after `since` was logged."""
    return next(iter(case.step_times(since)), None)


def next_save(case: Case, since: float) -> float | None:
    """When the first checkpoint after `since` was there."""
    return next((event["time"] for event in case.events("save", since)), None)


def new_shard(case: Case, since: float) -> float | None:
    """When the first shard of a worker was there that joined after `since`."""
    new = {event["worker"] for event in case.events("worker_join", since)}
    commits = case.events("commit", since)
    return next((event["time"] for event in commits if event["worker"] in new), None)


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    table = [["from ... to ...", "median, s", "worst, s"]]
    for name, values in found["seconds"].items():
        table.append([name, f"{median(values):.1f}", f"{max(values):.1f}"])
    load = ", ".join(f"{value:g}" for value in found["load"])
    rounds = len(found["load"])
    return (
        f"{markdown(table)}\n\n{rounds} rounds of one run each; load (5 minutes) at their ends: "
        f"{load}. Slurm here takes a node for lost after {LOST_S:g} s of silence, and starts a "
        f"requeued job after {DELAY_S:g} s at the earliest."
    )
