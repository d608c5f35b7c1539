"""Problems with a known answer: closed-form teachers, and digits.

A problem has teachers, the student's network, a fixed set of noises with their true end points,
and samples of the data. Everything follows from seeds, so two processes make the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distill.config import ImageSpec
from distill.flow.noise import permutation, sample_labels, sample_noise, uniform
from distill.flow.solvers import solve
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.config import NetworkConfig
from distill.networks.layers import AbstractNetwork
from distill.teachers.analytic import MixtureTeacher, random_mixture, ring

GRID = 8  # K, the product's default
TRAIN_SEED, TRUTH_SEED, DATA_SEED = 11, 12345, 99

# v(x [B, C, H, W], t [B], label [B]) -> velocity
Field = Callable[[Tensor, Tensor, Tensor], Tensor]


class VectorNetwork(AbstractNetwork):
    """u(x, t, s, label) for vectors [B, D, 1, 1]: a network of 0.25 to 0.35 M weights.

    Each hidden layer is scaled and shifted by an embedding of t and of s - t.
    """

    num_octaves, num_features = 4, 64

    def __init__(self, dimensions: int, seed: int, depth: int, width: int = 224) -> None:
        super().__init__(NetworkConfig(name="vector"), ImageSpec(dimensions, 1, 0))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(dimensions, width)
            self.embed = nn.Sequential(
                nn.Linear(4 * self.num_octaves, self.num_features), nn.SiLU()
            )
            self.modulations = nn.ModuleList(
                nn.Linear(self.num_features, 2 * width) for _ in range(depth)
            )
            self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
            self.last = nn.Linear(width, dimensions)
            self.skip = nn.Linear(self.num_features, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def last_layer(self) -> Tensor:
        return self.last.weight

    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        """[B, D, 1, 1]; the label is not looked at."""
        octaves = math.pi / 2 * 2 ** torch.arange(self.num_octaves, dtype=x.dtype)
        angles = torch.cat([t[:, None] * octaves, (s - t)[:, None] * octaves], dim=1)
        c = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        h = self.first(x.flatten(1))
        for modulation, layer in zip(self.modulations, self.hidden, strict=True):
            scale, shift = modulation(c).chunk(2, dim=1)
            h = layer(nn.functional.gelu(h * (1 + scale) + shift))
        out = self.last(nn.functional.gelu(h)) + self.skip(c) * x.flatten(1)
        return out.view_as(x)


@dataclass(frozen=True)
class Solved:
    """A teacher and how its trajectories are solved: `steps` from noise to data."""

    field: Field
    solver: str
    steps: int


@dataclass(frozen=True)
class Problem:
    """What all objectives of one comparison share.

    Attributes:
        name: of the problem.
        image: shape and classes.
        teachers: weakest first; the student learns the last.
        truth: the last teacher, solved finely.
        data: samples of the data [n, C, H, W].
        make_network: the student from a seed.
        num_pairs: training trajectories.
        num_truth: noises of the evaluation.
        steps, batch_size, lr: of the student's training at equal steps.
    """

    name: str
    image: ImageSpec
    teachers: tuple[Solved, ...]
    truth: Solved
    data: Tensor
    make_network: Callable[[int], AbstractNetwork]
    num_pairs: int
    num_truth: int
    steps: int
    batch_size: int
    lr: float

    def evaluation(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, label and true end point of the evaluation."""
        noise, labels = self.draw(TRUTH_SEED, self.num_truth)
        return noise, labels, integrate(self.truth, noise, labels, 1)[-1]

    def trajectories(self) -> tuple[Tensor, Tensor]:
        """States [N, M, K+1, C, H, W] and labels [N] of the training ids."""
        noise, labels = self.draw(TRAIN_SEED, self.num_pairs)
        paths = [integrate(teacher, noise, labels, GRID) for teacher in self.teachers]
        return torch.stack(paths, dim=0).permute(2, 0, 1, 3, 4, 5).contiguous(), labels

    def draw(self, seed: int, num: int) -> tuple[Tensor, Tensor]:
        """Noise and labels of ids 0 .. num - 1."""
        ids = np.arange(num)
        labels = sample_labels(seed, ids, self.image.num_classes)
        return torch.from_numpy(sample_noise(seed, ids, self.image.shape)), torch.from_numpy(labels)


@torch.no_grad()
def integrate(teacher: Solved, noise: Tensor, labels: Tensor, grid: int) -> Tensor:
    """States [grid + 1, B, C, H, W] at t = 0, 1/grid .. 1."""
    times = torch.linspace(0, 1, grid + 1, dtype=torch.float64)

    def part(x: Tensor, y: Tensor) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return teacher.field(x, t.expand(len(x)), y)

        return solve(velocity, x, times, teacher.solver, teacher.steps // grid)

    parts = zip(noise.split(512), labels.split(512), strict=True)
    return torch.cat([part(x, y) for x, y in parts], dim=1)


# Teacher, and hidden layers of the student's network: as many as `endpoint`, the best baseline at
# one evaluation, is best with. Last, the steps at equal steps.
MIXTURES: dict[str, tuple[Callable[[], MixtureTeacher], int, int]] = {
    "ring8": (ring, 5, 1200),
    "mixture64": (random_mixture, 3, 900),
    "mixture64_other": (lambda: random_mixture(count=12), 3, 900),  # other means and weights
}


def mixture_problem(name: str) -> Problem:
    """A closed-form teacher of `MIXTURES`; its trajectories are exact to float32 rounding."""
    make, depth, steps = MIXTURES[name]
    mixture = make()
    exact = Solved(mixture.velocity, "rk4", 32)
    noise = torch.from_numpy(sample_noise(DATA_SEED, np.arange(4000), mixture.image.shape))
    data = mixture.sample(noise, torch.from_numpy(uniform(DATA_SEED, "data", 0, 4000)).float())
    return Problem(
        name=name,
        image=mixture.image,
        teachers=(exact,),
        truth=Solved(mixture.velocity, "rk4", 64),
        data=data,
        make_network=lambda seed: VectorNetwork(mixture.image.channels, seed, depth),
        num_pairs=32_768,
        num_truth=4000,
        steps=steps,
        batch_size=256,
        lr=6e-3,
    )


class Pairs:
    """Global batches of trajectories in memory, every epoch shuffled by (seed, epoch)."""

    def __init__(self, states: Tensor, labels: Tensor, seed: int, batch_size: int) -> None:
        self._states, self._labels = states, labels
        self._seed, self._batch_size = seed, batch_size

    def read(self, step: int) -> TrajectoryBatch:
        """Batch `step`; every teacher has the same weight."""
        epoch, place = divmod(step, len(self._states) // self._batch_size)
        order = permutation(self._seed, "epoch", epoch, len(self._states))
        ids = torch.from_numpy(order[place * self._batch_size : (place + 1) * self._batch_size])
        teachers = self._states.shape[1]
        return TrajectoryBatch(
            states=self._states[ids],
            times=torch.linspace(0, 1, GRID + 1),
            weights=torch.full((len(ids), teachers), 1 / teachers),
            condition=self._labels[ids],
            ids=ids,
            positions=torch.arange(len(ids)),
            global_size=len(ids),
        )
