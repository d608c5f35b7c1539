"""Multi-teacher Bezier distillation (arXiv 2503.16562; docs/method.md for what we chose).

    B(t) = sum_k C(n,k) (1-t)^(n-k) t^k P_k,   P_0 = x_0, P_1 .. P_{n-1} guides, P_n = end point

    drift = D( u(B(t), t, t), B'(t) )
    map   = D( u(B(t), t, s), sg[ B'(t) + (s - t) d/dt u ] ),  tangent (B', 1, 0)
    end   = D( G(B(t), t, 1), P_n )

Control points, by variant:
    endpoint  P_k = output of teacher k from the same noise, weakest first; P_n = the best output
    path      the curve of degree n fitted through the states, a convex mixture over teachers
    straight  n = 1: x_0 and the best output. The control; with distance and times of
              `reflow` its drift is the same.

Sampling goes through the map G: a single Euler step of the drift does not land on P_n.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from distill.conditions.condition import Condition
from distill.flow.paths import MeanVelocity, bezier_fit, bezier_point, bezier_velocity, expand_as
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base, derivatives
from distill.objectives.config import GuidesConfig


def control_points(batch: TrajectoryBatch, variant: str, degree: int) -> Float[Tensor, "B n1 *S"]:
    """P_0 .. P_n of every sample.

    n is `degree` for `path`, the number of teachers for `endpoint`, and 1 for `straight`.
    """
    if variant == "straight":
        return torch.stack([batch.noise, batch.best[:, -1]], dim=1)
    if variant == "endpoint":
        return torch.cat([batch.noise[:, None], batch.outputs], dim=1)
    fitted = [
        bezier_fit(batch.states[:, m], batch.times, degree) * expand_as(weight, batch.states[:, 0])
        for m, weight in enumerate(batch.weights.unbind(dim=1))
    ]
    return torch.stack(fitted).sum(dim=0)


class Guides:
    """Drift, map and end losses on the curve."""

    def __init__(self, config: GuidesConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        config, terms = self.config, {}
        points = control_points(batch, config.variant, config.degree)
        t = base.draw(self.seed, "bezier/t", step, batch)
        if config.weight_drift > 0:
            terms["drift"] = self.drift_term(points, t)
        if config.weight_map > 0:
            s = t + (1 - t) * base.draw(self.seed, "bezier/s", step, batch)
            terms["map"] = self.map_term(points, t, s, student, batch.condition)
        if config.weight_end > 0:
            full = base.draw(self.seed, "bezier/full", step, batch) < config.p_full
            terms["end"] = self.end_term(points, t.where(~full, torch.zeros_like(t)))
        return base.loss_terms(terms, student, batch.condition)

    def drift_term(self, points: Float[Tensor, "B n1 *S"], t: Float[Tensor, "B"]) -> base.Term:
        """D( u(B(t), t, t), B'(t) )."""
        v = bezier_velocity(points, t)
        call = base.Call(bezier_point(points, t), t, t)
        return base.Term(
            self.config.weight_drift, [call], lambda u: self.distances.velocities(u, v)
        )

    def map_term(
        self,
        points: Float[Tensor, "B n1 *S"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        student: MeanVelocity,
        condition: Condition,
    ) -> base.Term:
        """D( u(B(t), t, s), sg[ B'(t) + (s - t) d/dt u ] )."""
        v = bezier_velocity(points, t)
        call = base.Call(bezier_point(points, t), t, s)

        def value(u: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
            goal = derivatives.eulerian_target(
                student, u, call, v, condition, self.config.derivative
            )
            return self.distances.velocities(u, goal)

        return base.Term(self.config.weight_map, [call], value)

    def end_term(self, points: Float[Tensor, "B n1 *S"], t: Float[Tensor, "B"]) -> base.Term:
        """D( G(B(t), t, 1), P_n )."""
        call = base.Call(bezier_point(points, t), t, torch.ones_like(t))
        return base.Term(
            self.config.weight_end,
            [call],
            lambda u: self.distances.states(call.landing(u), points[:, -1]),
        )
