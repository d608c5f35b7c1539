"""Several teachers: where guides help a Bezier objective, and where not. Equal pairs throughout.

Truth is the exact mixture in every set, whatever the teachers are.

| set | teachers, weakest first | asks |
|---|---|---|
| exact | the exact one | does a curve help with one teacher? |
| twice | the exact one, twice | control: the warp in time of a guide, without its content |
| cheap | 8 Euler steps, the exact one | does a cheap teacher guide an exact one? |
| noisy | four with errors of their own | do several bad teachers beat one of them? |
| reflowed | thrice reflowed, twice reflowed | does it undo the error of repeated reflow? |
| reflowed3 | thrice reflowed | what repeated reflow alone gives |
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.objectives.problems import MIXTURES, Field, Problem, Solved, mixture_problem
from benchmarks.objectives.student import train_student
from distill.config import TrainConfig
from distill.objectives.config import GuidesConfig, ObjectiveConfig, ReflowConfig
from distill.teachers.analytic import MixtureTeacher

NOISE_OF_TEACHERS = 0.2  # standard deviation of the error of every mean, per axis
NUM_NOISY = 4
STEPS, PAIRS = 240, 16_384  # of every student here

STRAIGHT = GuidesConfig(variant="straight")
SETS: dict[str, dict[str, ObjectiveConfig]] = {
    "exact": {
        "straight": STRAIGHT,
        "path 2": GuidesConfig(variant="path", degree=2),
        "path 3": GuidesConfig(variant="path", degree=3),
    },
    "twice": {"endpoint 2": GuidesConfig(variant="endpoint")},
    "cheap": {"endpoint 2": GuidesConfig(variant="endpoint")},
    "noisy": {
        "straight, last alone": STRAIGHT,
        "path 1, mean of four": GuidesConfig(variant="path", degree=1),
        "path 2, mean of four": GuidesConfig(variant="path", degree=2),
        "endpoint 4": GuidesConfig(variant="endpoint"),
    },
    "reflowed": {
        "straight, last alone": STRAIGHT,
        "path 1, mean of two": GuidesConfig(variant="path", degree=1),
        "path 2, mean of two": GuidesConfig(variant="path", degree=2),
        "endpoint 2": GuidesConfig(variant="endpoint"),
    },
    "reflowed3": {"straight": STRAIGHT},
}
MIXED = ("ring8", "mixture64")
GUIDED = {f"{name}/{kind}": rows for name in MIXED for kind, rows in SETS.items()}


def guided_problem(name: str, folder: Path) -> Problem:
    """The problem "MIXTURE/SET"; reflowed teachers are kept in `folder`."""
    base, kind = name.split("/")
    exact = mixture_problem(base)
    fine = exact.teachers[0]
    match kind:
        case "twice":
            teachers = (fine, fine)
        case "cheap":
            teachers = (replace(fine, solver="euler", steps=8), fine)
        case "noisy":
            mixture = MIXTURES[base][0]()
            teachers = tuple(replace(fine, field=perturbed(mixture, k)) for k in range(NUM_NOISY))
        case "reflowed":
            teachers = (reflowed(exact, 3, folder), reflowed(exact, 2, folder))
        case "reflowed3":
            teachers = (reflowed(exact, 3, folder),)
        case _:
            teachers = (fine,)
    return replace(exact, name=name, teachers=teachers, num_pairs=PAIRS, steps=STEPS)


def perturbed(mixture: MixtureTeacher, index: int) -> Field:
    """The velocity of the mixture with an error on every mean, another one for every index."""
    draw = np.random.Generator(np.random.Philox(key=[7, index]))
    error = torch.from_numpy(draw.standard_normal(tuple(mixture.means.shape)))
    means = mixture.means + NOISE_OF_TEACHERS * error
    return MixtureTeacher(means, mixture.stds, mixture.weights).velocity


def reflowed(exact: Problem, times: int, folder: Path) -> Solved:
    """The teacher after `times` - 1 reflows of the exact one: a `times`-rectified flow.

    Trained now if it is not there.
    """
    path = folder / f"{exact.name}_{times}.safetensors"
    if not path.exists():
        source = exact.teachers[0] if times == 2 else reflowed(exact, times - 1, folder)
        problem = replace(exact, teachers=(source,))
        settings = TrainConfig(
            max_steps=exact.steps, batch_size=exact.batch_size, lr=exact.lr, warmup_steps=50
        )
        pairs = problem.trajectories()
        network, _ = train_student(problem, pairs, ReflowConfig(), settings, times)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), path)
    network = exact.make_network(0)
    network.load_state_dict(load_file(path))
    network.eval().requires_grad_(False)
    return Solved(lambda x, t, label: network(x, t, t, label), "rk4", 8)


def prepare(name: str, folder: Path) -> None:
    """Trains the reflowed teachers of a mixture that are not there yet."""
    reflowed(mixture_problem(name), 3, folder)
