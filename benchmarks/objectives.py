"""Every objective on teachers with a known answer, at equal steps and at equal compute.

    python benchmarks/objectives.py             whole: three seeds, every problem
    python benchmarks/objectives.py --quick     one seed, short training
    python benchmarks/objectives.py --seeds 1 --problems moons --tables "equal compute"

Same trajectories, same student network, same optimiser for every objective. Two normalisations:
equal optimiser steps, and equal work of the student in forwards (a backward pass counts as two,
`ObjectiveConfig.calls`). All are sampled on even jumps. The problems of CHOOSING are those on which
defaults may be chosen; on those of HELD_OUT nothing is. Finished trainings are kept in
benchmarks/.cache and not repeated while code and settings are the same. Without --quick it writes
docs/benchmarks/{objectives,held_out}.{json,png} of the problems it ran, and tables into
docs/results.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one training per core
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from torch import Tensor

from benchmarks.objectives import summary
from benchmarks.objectives.digits import digits_problem
from benchmarks.objectives.guides import GUIDED, MIXED, STEPS, guided_problem, prepare
from benchmarks.objectives.plane import SHAPES, plane_problem
from benchmarks.objectives.problems import MIXTURES, Problem, integrate, mixture_problem
from benchmarks.objectives.student import energy_distance, measure, train_student
from cluster.settings.hydra import compose
from distill.config import TrainConfig
from distill.evaluation.metrics import relative_distance
from distill.flow.times import NFE_PER_STEP
from distill.objectives.config import EndpointConfig, ObjectiveConfig

CACHE = ROOT / "benchmarks" / ".cache"
SEEDS = (0, 1, 2)
CHOOSING = ("ring8", "mixture64", "digits")
HELD_OUT = (*SHAPES, "mixture64_other", "digits_other")  # nothing is chosen by them
PROBLEMS = (*CHOOSING, *HELD_OUT)
OVERRIDES = {  # the shipped settings, by name in configs/objective
    "traflow": [],  # with one teacher it is `bezier` too
    "traflow_summed": [],
    "scot": [],
    "bezier_guides": [],  # one teacher here; more of them below
    "endpoint": [],
    "reflow": ["objective.times=u_shaped"],
    "consistency": [],
    "ctm": [],
    "meanflow": [],
    "ayf": [],
    "lagrangian": [],
    "shortcut": [],
    "progressive": [],
}
TEACHER_NFE = (1, 2, 4, 8, 16)
TABLES = ("equal steps", "equal compute", "guides")


@dataclass(frozen=True)
class Training:
    """One student to train.

    Attributes:
        problem: a name of PROBLEMS, or of the guided problems of `benchmarks.objectives.guides`.
        row: what it is called in the tables.
        objective: its settings.
        steps: optimiser steps.
        seed: of the student's weights, of the order of the data and of random times.
        is_quick: short training on few pairs.
    """

    problem: str
    row: str
    objective: ObjectiveConfig
    steps: int
    seed: int
    is_quick: bool

    @property
    def forwards(self) -> float:
        """Work of the student per sample of a batch, in forwards, over the whole training."""
        return self.steps * self.objective.calls().in_forwards


# -----------------------------------------------------------------------------------------------
# What is shared by the trainings of a process


def shipped(name: str) -> ObjectiveConfig:
    """The objective as a run composes it, with the overrides of the benchmark."""
    return compose(["experiment=digits", f"objective={name}", *OVERRIDES[name]])[0].objective


@cache
def make_problem(name: str, is_quick: bool) -> Problem:
    """A problem by name."""
    if name.startswith("digits"):
        problem = digits_problem(name, CACHE / (f"{name}_quick" if is_quick else name), is_quick)
    elif name in SHAPES:
        kind = "plane_quick" if is_quick else "plane"
        problem = plane_problem(name, CACHE / f"{kind}_{code_hash()[:12]}", is_quick)
    elif name in MIXTURES:
        problem = mixture_problem(name)
    else:
        problem = guided_problem(name, reflowed_folder())
    if is_quick:
        problem = replace(problem, num_pairs=2048, num_truth=500, steps=problem.steps // 5)
    return problem


@cache
def trajectories(name: str, is_quick: bool) -> tuple[Tensor, Tensor]:
    """The trajectories of a problem, made once per process."""
    return make_problem(name, is_quick).trajectories()


@cache
def evaluation(name: str, is_quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, labels and true ends of a problem, made once per process."""
    return make_problem(name, is_quick).evaluation()


def run(trainings: list[Training]) -> list[tuple[Training, dict[str, Any]]]:
    """Trains and measures students, one after the other."""
    torch.set_num_threads(1)
    return [(training, run_one(training)) for training in trainings]


def run_one(training: Training) -> dict[str, Any]:
    """Trains and measures one student, or takes it from the cache."""
    path = CACHE / f"{cache_key(training)}.json"
    if not path.exists():
        problem = make_problem(training.problem, training.is_quick)
        settings = TrainConfig(
            max_steps=training.steps, batch_size=problem.batch_size, lr=problem.lr, warmup_steps=50
        )
        shared = training.problem, training.is_quick
        network, seconds = train_student(
            problem, trajectories(*shared), training.objective, settings, training.seed
        )
        measured = measure(problem, evaluation(*shared), network, seconds)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(measured)))
        temporary.replace(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def cache_key(training: Training) -> str:
    """Changes with the settings and with any line of code that can change the result."""
    settings = json.dumps(asdict(training), sort_keys=True)
    return hashlib.sha256((code_hash() + settings).encode()).hexdigest()[:24]


@cache
def code_hash() -> str:
    """sha256 over the method's sources and the benchmark's."""
    sources = [ROOT / "distill" / "config.py", ROOT / "distill" / "engine" / "engine.py"]
    for name in ("problems", "student", "digits", "guides", "plane"):
        sources.append(ROOT / "benchmarks" / "objectives" / f"{name}.py")
    for folder in ("flow", "objectives", "networks", "teachers"):
        sources += (ROOT / "distill" / folder).glob("*.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()


def reflowed_folder() -> Path:
    """Of the reflowed teachers, which change with the code like everything they are trained by."""
    return CACHE / f"reflowed_{code_hash()[:12]}"


# -----------------------------------------------------------------------------------------------
# Plan


def plan(is_quick: bool, problems: list[str], seeds: int) -> Iterator[tuple[str, Training]]:
    """(table, training) of everything to do."""
    objectives = {name: shipped(name) for name in OVERRIDES}
    for problem in reversed(problems):  # the longest first, so that no core idles at the end
        steps = make_problem(problem, is_quick).steps
        budget = steps * EndpointConfig().calls().in_forwards  # of equal compute
        for seed in SEEDS[: 1 if is_quick else seeds]:
            for row, objective in objectives.items():
                yield "equal steps", Training(problem, row, objective, steps, seed, is_quick)
                if not is_quick:
                    same = int(budget // objective.calls().in_forwards)
                    yield "equal compute", Training(problem, row, objective, same, seed, is_quick)
    if not is_quick:
        for name, rows in GUIDED.items():
            for row, objective in rows.items():
                for seed in SEEDS[:seeds]:
                    yield "guides", Training(name, row, objective, STEPS, seed, is_quick)


def in_parts(trainings: list[Training]) -> list[list[Training]]:
    """What a process takes at once: one training, or all on the trajectories of a guided problem,
    which cost as much to make as a training.
    """
    parts: dict[str, list[Training]] = {}
    for text, training in {repr(training): training for training in trainings}.items():
        key = training.problem if training.problem in GUIDED else text
        parts.setdefault(key, []).append(training)
    return list(parts.values())


def teacher_rows(name: str, is_quick: bool) -> list[dict[str, Any]]:
    """The teacher's own solvers on the same noises."""
    problem = make_problem(name, is_quick)
    noise, labels, ends = evaluation(name, is_quick)
    rows = []
    for solver in ("euler", "heun"):
        for nfe in TEACHER_NFE:
            if nfe % NFE_PER_STEP[solver] == 0:
                steps = nfe // NFE_PER_STEP[solver]
                solved = replace(problem.truth, solver=solver, steps=steps)
                x = integrate(solved, noise, labels, 1)[-1]
                distance = relative_distance(x, ends, noise)
                energy = energy_distance(x, problem.data)
                rows.append({"solver": solver, "nfe": nfe, "distance": distance, "energy": energy})
    return rows


def row_of(table: str, training: Training, measured: dict[str, Any]) -> dict[str, Any]:
    """A line of a table."""
    return {
        "table": table,
        "problem": training.problem,
        "row": training.row,
        "seed": training.seed,
        "steps": training.steps,
        "forwards": training.forwards,
        **measured,
    }


def main() -> None:
    """Runs all of it and writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, short training")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="leave out the others"
    )
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    started = time.perf_counter()
    torch.set_num_threads(options.jobs)
    teachers = {name: teacher_rows(name, options.quick) for name in options.problems}
    todo = [
        (table, training)
        for table, training in plan(options.quick, options.problems, options.seeds)
        if table in options.tables
    ]
    cached = sum((CACHE / f"{cache_key(training)}.json").exists() for _, training in todo)
    parts = in_parts([training for _, training in todo])
    results: dict[str, dict[str, Any]] = {}
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    pool = multiprocessing.get_context("spawn").Pool(options.jobs)
    with pool, Progress(*columns, console=Console(stderr=True)) as progress:
        if "guides" in options.tables and not options.quick:
            pool.starmap(prepare, [(name, reflowed_folder()) for name in MIXED])
        task = progress.add_task("trainings", total=sum(map(len, parts)))
        for part in pool.imap_unordered(run, parts):
            results |= {repr(training): measured for training, measured in part}
            progress.advance(task, len(part))
    rows = [row_of(table, training, results[repr(training)]) for table, training in todo]
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.1f} minutes")
    for name, group in (("objectives", CHOOSING), ("held_out", HELD_OUT)):
        ours = [row for row in rows if row["problem"].split("/")[0] in group]
        if not ours:
            continue
        found = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, no GPU used",
            "command": shlex.join(["python", "benchmarks/objectives.py", *sys.argv[1:]]),
            "quick": options.quick,
            "minutes": round(minutes, 1),
            "cached": cached,
            "teachers": {problem: teachers[problem] for problem in teachers if problem in group},
            "rows": ours,
        }
        text = summary.tables(found)
        print(text)
        if not options.quick:
            summary.write(options.out, options.page, name, found, text)


if __name__ == "__main__":
    main()
