"""Problems with a known answer: closed-form teachers and the digits teacher.

A problem has a teacher, trajectories that every objective shares, the student's network, the exact
end points of a fixed set of noises, and samples of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.config import ImageSpec
from distill.noise import permutation, sample_labels, sample_noise, uniform
from distill.solvers import solve
from distill.teachers.analytic import MixtureTeacher, random_mixture, ring
from distill.trajectory import TrajectoryBatch

GRID = 8  # K, as in the product's default
TRUTH_STEPS = 64  # of RK4 for closed-form teachers
PAIRS_SEED, TRUTH_SEED = 11, 12345

# v(x [B, *S], t [B], label [B]) -> velocity
Field = Callable[[Tensor, Tensor, Tensor], Tensor]


class VectorNetwork(nn.Module):
    """u(x, t, s, label) for vectors [B, D, 1, 1]: four hidden layers, about 0.2 M parameters."""

    def __init__(self, dimensions: int, width: int = 256, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(dimensions + 16, width),
                nn.GELU(),
                nn.Linear(width, width),
                nn.GELU(),
                nn.Linear(width, width),
                nn.GELU(),
                nn.Linear(width, width),
                nn.GELU(),
            )
            self.last = nn.Linear(width, dimensions)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradient balances adaptive terms."""
        return self.last.weight

    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        """[B, D, 1, 1]."""
        octaves = math.pi / 2 * 2 ** torch.arange(4, dtype=x.dtype, device=x.device)
        angles = torch.cat([t[:, None] * octaves, (s - t)[:, None] * octaves], dim=1)
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)
        return self.last(self.layers(features)).view_as(x)


@dataclass
class Problem:
    """What all objectives of one comparison share.

    Attributes:
        name: of the problem.
        image: shape and classes.
        fields: velocities of the teachers, weakest first.
        solvers: (solver, steps) of each teacher.
        data: samples of the data distribution [n, *S].
        make_network: student's network from a seed.
    """

    name: str
    image: ImageSpec
    fields: list[Field]
    solvers: list[tuple[str, int]]
    data: Tensor
    make_network: Callable[[int], nn.Module]
    truth_steps: int = TRUTH_STEPS
    truth_solver: str = "rk4"
    num_truth: int = 4000

    @cached_property
    def evaluation(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, label and exact end point of the best teacher, for the evaluation."""
        noise, labels = draw(self.image, TRUTH_SEED, np.arange(self.num_truth))
        ends = integrate(self.fields[-1], noise, labels, self.truth_solver, self.truth_steps, 1)
        return noise, labels, ends[-1]

    def trajectories(self, num: int) -> tuple[Tensor, Tensor]:
        """States [num, M, K+1, *S] and labels of the first `num` training ids."""
        noise, labels = draw(self.image, PAIRS_SEED, np.arange(num))
        paths = [
            integrate(field, noise, labels, solver, steps, GRID).transpose(0, 1)
            for field, (solver, steps) in zip(self.fields, self.solvers, strict=True)
        ]
        return torch.stack(paths, dim=1), labels


def draw(image: ImageSpec, seed: int, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Noise and labels of sample ids."""
    noise = torch.from_numpy(sample_noise(seed, ids, image.shape))
    return noise, torch.from_numpy(sample_labels(seed, ids, image.num_classes))


@torch.no_grad()
def integrate(
    field: Field, noise: Tensor, labels: Tensor, solver: str, steps: int, grid: int
) -> Tensor:
    """States [grid + 1, B, *S] at t = 0, 1/grid .. 1."""
    times = torch.linspace(0, 1, grid + 1, dtype=torch.float64)
    parts = [
        solve(lambda x, t, y=y: field(x, t.expand(len(x)), y), x, times, solver, steps // grid)
        for x, y in zip(noise.split(1024), labels.split(1024), strict=True)
    ]
    return torch.cat(parts, dim=1)


def mixture_problem(name: str, teacher: MixtureTeacher) -> Problem:
    """A closed-form teacher, solved to rounding."""
    ids = np.arange(4000)
    noise, _ = draw(teacher.image, 99, ids)
    data = teacher.sample(noise, torch.from_numpy(uniform(99, "data", 0, len(ids))).float())
    return Problem(
        name=name,
        image=teacher.image,
        fields=[teacher.velocity],
        solvers=[("rk4", TRUTH_STEPS)],
        data=data,
        make_network=lambda seed: VectorNetwork(teacher.image.channels, seed=seed),
    )


class Pairs:
    """Global batches of stored trajectories, shuffled by (seed, epoch)."""

    def __init__(self, states: Tensor, labels: Tensor, seed: int, batch_size: int) -> None:
        self._states, self._labels = states, labels
        self._seed, self._batch_size = seed, batch_size

    def read(self, step: int) -> TrajectoryBatch:
        """Batch `step`."""
        per_epoch = len(self._states) // self._batch_size
        epoch, place = divmod(step, per_epoch)
        order = permutation(self._seed, "epoch", epoch, len(self._states))
        ids = torch.from_numpy(order[place * self._batch_size : (place + 1) * self._batch_size])
        teachers = self._states.shape[1]
        return TrajectoryBatch(
            states=self._states[ids].float(),
            times=torch.linspace(0, 1, GRID + 1),
            weights=torch.full((teachers,), 1 / teachers),
            labels=self._labels[ids],
            ids=ids,
            positions=torch.arange(len(ids)),
            global_size=len(ids),
        )
