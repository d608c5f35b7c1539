"""Held-out problems in the plane: moons, spirals, a checkerboard. The teacher is a field that was
trained on their samples, once, and is kept in a folder; so it has errors, as a teacher has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.objectives.problems import DATA_SEED, Problem, Solved, VectorNetwork
from benchmarks.objectives.student import averaged, fit
from distill.config import ImageSpec, TrainConfig
from distill.datasets.images import FIRST_NOISE
from distill.flow.noise import sample_noise, uniform
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives.config import ReflowConfig

IMAGE = ImageSpec(2, 1, 0)
PRETRAIN = TrainConfig(max_steps=2000, batch_size=512, lr=3e-3, warmup_steps=50)
TEACHER_SEED = 7


def moons(u: Tensor, z: Tensor) -> Tensor:
    """Two half circles, each around an end of the other."""
    angle, top = u[:, 0] * math.pi, u[:, 1] < 0.5
    x = torch.where(top, angle.cos(), 1 - angle.cos())
    y = torch.where(top, angle.sin(), 0.5 - angle.sin())
    return 2 * (torch.stack([x, y], dim=1) - torch.tensor([0.5, 0.25])) + 0.12 * z


def spirals(u: Tensor, z: Tensor) -> Tensor:
    """Two arms of one and a half turns."""
    angle = u[:, 0].sqrt() * 3 * math.pi
    radius = torch.where(u[:, 1] < 0.5, 1.0, -1.0) * angle * (2.5 / (3 * math.pi))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1) + 0.06 * z


def checkerboard(u: Tensor, z: Tensor) -> Tensor:
    """Eight of sixteen squares of [-2, 2]^2."""
    column, row = (4 * u[:, 0]).floor(), (2 * u[:, 1]).floor()
    corner = torch.stack([column, 2 * row + column % 2], dim=1)
    return corner + torch.stack([4 * u[:, 0] - column, 2 * u[:, 1] - row], dim=1) - 2


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "moons": moons,
    "spirals": spirals,
    "checkerboard": checkerboard,
}


def points(name: str, seed: int, index: int, num: int) -> Tensor:
    """Samples [num, 2, 1, 1] of a shape, from (seed, index)."""
    u = [uniform(seed, f"{name}/{axis}", index, num) for axis in ("along", "which")]
    ids = FIRST_NOISE + index * num + np.arange(num)
    z = torch.from_numpy(sample_noise(seed, ids, (2,)))
    return SHAPES[name](torch.from_numpy(np.stack(u, axis=1)).float(), z)[:, :, None, None]


def train_teacher(name: str, path: Path, settings: TrainConfig) -> None:
    """Trains the field by flow matching on fresh samples, into a file."""
    size = settings.batch_size

    def read(step: int) -> TrajectoryBatch:
        noise = torch.from_numpy(
            sample_noise(TEACHER_SEED, step * size + np.arange(size), (2, 1, 1))
        )
        states = torch.stack([noise, points(name, TEACHER_SEED, step, size)], dim=1)[:, None]
        return TrajectoryBatch(
            states=states,
            times=torch.tensor([0.0, 1.0]),
            weights=torch.ones(size, 1),
            condition=torch.full((size,), -1),
            ids=torch.arange(size),
            positions=torch.arange(size),
            global_size=size,
        )

    engine = fit(empty_field(), read, ReflowConfig(), settings, TEACHER_SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(averaged(engine, empty_field()).state_dict(), path)


def empty_field() -> VectorNetwork:
    """The teacher's network, larger than the student's."""
    return VectorNetwork(2, TEACHER_SEED, depth=3, width=128)


def plane_problem(name: str, folder: Path, is_quick: bool) -> Problem:
    """A shape of SHAPES; its teacher is trained now if it is not in `folder`, briefly if
    `is_quick`.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        train_teacher(name, path, replace(PRETRAIN, max_steps=300) if is_quick else PRETRAIN)
    network = empty_field()
    network.load_state_dict(load_file(path))
    network.eval().requires_grad_(False)

    def field(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return network(x, t, t, label)

    return Problem(
        name=name,
        image=IMAGE,
        teachers=(Solved(field, "rk4", 24),),
        truth=Solved(field, "rk4", 48),
        data=points(name, DATA_SEED, 0, 4000),
        make_network=lambda seed: VectorNetwork(2, seed, depth=3, width=96),
        num_pairs=16_384,
        num_truth=2000,
        steps=900,
        batch_size=256,
        lr=6e-3,
    )
