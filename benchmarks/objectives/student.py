"""Trains one student in this process and measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.objectives.problems import Pairs, Problem
from distill.config import TrainConfig
from distill.engine.engine import EVALUATION, TorchEngine, average_kind
from distill.evaluation.metrics import relative_distance
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.layers import AbstractNetwork
from distill.objectives.build import build_objective
from distill.objectives.config import ObjectiveConfig
from distill.sample import few_step
from distill.training.loop import learning_rate

NFE = (1, 2, 3, 4, 8, 16)


@dataclass
class Measured:
    """One trained student.

    Attributes:
        distance: `distance_to_teacher` at every NFE.
        energy: energy distance to samples of the data at every NFE.
        off_data: share of samples off the data at every NFE, in the plane.
        seconds: of the training.
    """

    distance: dict[int, float]
    energy: dict[int, float]
    off_data: dict[int, float]
    seconds: float


def fit(
    network: AbstractNetwork,
    read: Callable[[int], TrajectoryBatch],
    objective: ObjectiveConfig,
    settings: TrainConfig,
    seed: int,
) -> TorchEngine:
    """The engine after all steps: `distill.training.loop` without logs, checkpoints and
    resumption.
    """
    engine = TorchEngine(network, settings, torch.device("cpu"))
    loss = build_objective(
        objective, seed, gradient_norms=engine.gradient_norms, max_steps=settings.max_steps
    )
    for step in range(settings.max_steps):
        terms = loss.loss(read(step), engine.student, engine.target, step)
        engine.backward(terms.total, last=True)
        engine.step(step, learning_rate(step, settings))
    return engine


def train_student(
    problem: Problem,
    trajectories: tuple[Tensor, Tensor],
    objective: ObjectiveConfig,
    settings: TrainConfig,
    seed: int,
) -> tuple[AbstractNetwork, float]:
    """The average that is evaluated, as a network, and the seconds of training."""
    pairs = Pairs(*trajectories, seed, settings.batch_size)
    started = time.perf_counter()
    engine = fit(problem.make_network(seed), pairs.read, objective, settings, seed)
    seconds = time.perf_counter() - started
    return averaged(engine, problem.make_network(seed)), seconds


@torch.no_grad()
def averaged(engine: TorchEngine, network: AbstractNetwork) -> AbstractNetwork:
    """`network` with the weights of the evaluation average."""
    for fragment in engine.fragments():
        if fragment.kind == average_kind(EVALUATION):
            weight = network.get_parameter(fragment.name)
            weight.copy_(fragment.data.view(weight.shape))
    return network.eval().requires_grad_(False)


def measure(
    problem: Problem,
    evaluation: tuple[Tensor, Tensor, Tensor],
    network: AbstractNetwork,
    seconds: float,
) -> Measured:
    """The student at every NFE, on even jumps."""
    noise, labels, ends = evaluation
    samples = {n: few_step(network, noise, labels, n) for n in NFE}
    return Measured(
        {n: relative_distance(x, ends, noise) for n, x in samples.items()},
        {n: energy_distance(x, problem.data) for n, x in samples.items()},
        {n: off_data(x, problem.data) for n, x in samples.items()}
        if problem.image.shape == (2, 1, 1)
        else {},
        seconds,
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| in float64 (Szekely and Rizzo, 2013); 0: the same law.

    Independent pairs only (the diagonal of the last two is left out), so it may come out below 0.
    At most 2,000 samples of each are used.
    """
    a, b = a[:2000].flatten(1).double(), b[:2000].flatten(1).double()

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def off_data(x: Tensor, data: Tensor) -> float:
    """The share of samples that lie further from the data than 99 % of the data from the rest of
    it; 0.01 or so for the data themselves.
    """
    x, data = x.flatten(1), data.flatten(1)
    own = torch.cdist(data, data).fill_diagonal_(torch.inf).min(dim=1).values
    away = torch.cdist(x, data).min(dim=1).values
    return float((away > own.quantile(0.99)).double().mean())
