"""Distillation of a rectified flow (Liu et al., 2023): D( G(x_0, 0, 1), X_K )."""

import torch

from distill.flow.paths import MeanVelocity
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base
from distill.objectives.config import EndpointConfig


def output_term(batch: TrajectoryBatch, distance: base.Distance, weight: float) -> base.Term:
    """D( G(x_0, 0, 1), X_K ): one jump from noise to the teacher's output."""
    zero = torch.zeros_like(batch.noise.flatten(1)[:, 0])
    jump = base.Call(batch.noise, zero, zero + 1)
    return base.Term(weight, [jump], lambda u: distance(jump.landing(u), batch.best[:, -1]))


class Endpoint:
    """The baseline: the teacher's output alone."""

    def __init__(self, config: EndpointConfig, distances: base.Distances) -> None:
        self.distances = distances

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        terms = {"output": output_term(batch, self.distances.states, 1.0)}
        return base.loss_terms(terms, student, batch.condition)
