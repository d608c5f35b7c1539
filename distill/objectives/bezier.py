"""Bezier distillation of several teachers (arXiv 2503.16562; docs/method.md for what we chose).

    P = sum_m a_m(y) P^m

P^m are the control points of teacher m's curve (`distill.flow.curve`): a composite Bezier curve of
degree 3 through its states, from the noise that all teachers share. Their convex mixture is such a
curve again. a_m(y) is the weight of teacher m for a sample of class y: a number, or a table, with
which a student has of each teacher the classes that it is good at. The drawn targets of
`distill.objectives.drawn` are asked on the mixed curve; of one teacher they are those of TraFlow.

One curve of degree n from noise to data, with outputs of teachers as guides, is
`distill.objectives.guides`.
"""

import torch

from distill.flow.curve import Curve, curve_through
from distill.flow.paths import MeanVelocity
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base, drawn
from distill.objectives.config import BezierConfig


def mixed_curve(batch: TrajectoryBatch) -> Curve:
    """The curve whose control points are the mixtures of the teachers'.

    They are linear in states and velocities, so these are mixed.
    """
    parts = [batch.states] if batch.velocities is None else [batch.states, batch.velocities]
    states, *velocities = (torch.einsum("bm,bmk...->bk...", batch.weights, p) for p in parts)
    return curve_through(states, batch.times, *velocities)


class Bezier:
    """Drawn targets on the mixed curve of all teachers."""

    def __init__(self, config: BezierConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        curve = mixed_curve(batch)
        return drawn.drawn_terms(
            self.config, self.distances, self.seed, curve, batch, student, target, step
        )
