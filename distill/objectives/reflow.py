"""Flow matching on pairs: D( u(x_t, t, t), x_1 - x_0 ), x_t = (1 - t) x_0 + t x_1.

On teacher pairs (x_0, x_1 = X_K) it is the next rectified flow (Liu et al., 2023). On independent
(noise, real image) pairs it is plain flow matching, which trains a teacher.
`distill.datasets.images` has these pairs.
"""

from math import sinh

import torch
from jaxtyping import Float

from distill.flow.paths import MeanVelocity, interpolate
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base
from distill.objectives.config import ReflowConfig

U_SHAPE = 4.0  # a in p(t) ~ cosh(a (t - 1/2)) (Lee et al., 2024, section 4.1)


def u_shaped(u: Float[torch.Tensor, "B"]) -> Float[torch.Tensor, "B"]:
    """Times with density ~ e^(a t) + e^(a (1 - t)), more near both ends, from uniform `u`.

    The inverse of the distribution function: t = (1 + asinh((2u - 1) sinh(a/2)) / (a/2)) / 2.
    """
    half = U_SHAPE / 2
    return 0.5 + torch.asinh((2 * u - 1) * sinh(half)) / (2 * half)


def flow_matching_term(
    batch: TrajectoryBatch, t: Float[torch.Tensor, "B"], distance: base.Distance, weight: float
) -> base.Term:
    """D( u(x_t, t, t), x_1 - x_0 )."""
    x_0, x_1 = batch.noise, batch.best[:, -1]
    call = base.Call(interpolate(x_0, x_1, t), t, t)
    return base.Term(weight, [call], lambda u: distance(u, x_1 - x_0))


class Reflow:
    """The baseline, and the loss of pre-training."""

    def __init__(self, config: ReflowConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        t = base.draw(self.seed, "reflow/t", step, batch)
        if self.config.times == "u_shaped":
            t = u_shaped(t)
        term = flow_matching_term(batch, t, self.distances.velocities, 1.0)
        return base.loss_terms({"flow_matching": term}, student, batch.condition)
