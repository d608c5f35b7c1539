"""Distillation of a rectified flow (Liu et al., 2023): D( G(x_0, 0, 1), X_K )."""

import torch

from distill.flow.paths import MeanVelocity
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives.base import Call, LossTerms, Term, loss_terms
from distill.objectives.config import EndpointConfig
from distill.objectives.distances import Distance, Distances


def output_term(batch: TrajectoryBatch, distance: Distance, weight: float) -> Term:
    """D( G(x_0, 0, 1), X_K ): one jump from noise to the teacher's output."""
    zero = torch.zeros_like(batch.noise.flatten(1)[:, 0])
    jump = Call(batch.noise, zero, zero + 1)
    return Term(weight, [jump], lambda u: distance(jump.landing(u), batch.best[:, -1]))


class Endpoint:
    """The baseline: the teacher's output alone."""

    def __init__(self, config: EndpointConfig, distances: Distances) -> None:
        self.distances = distances

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        terms = {"output": output_term(batch, self.distances.states, 1.0)}
        return loss_terms(terms, student, batch.labels)
