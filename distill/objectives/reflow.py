"""Flow matching on pairs: D( u(x_t, t, t), x_1 - x_0 ), x_t = (1 - t) x_0 + t x_1.

On teacher pairs (x_0, x_1 = X_K) it is the next rectified flow (Liu et al., 2023). On independent
(noise, real image) pairs it is plain flow matching, which trains a teacher (`distill.pretrain`).
"""

from math import sinh

import torch
from jaxtyping import Float
from torch import Tensor

from distill.config import ReflowConfig
from distill.objectives.base import LossTerms, distance, draw, weighted_sum
from distill.paths import MeanVelocity, interpolate
from distill.trajectory import TrajectoryBatch

U_SHAPE = 4.0  # a in p(t) ~ cosh(a (t - 1/2)) (Lee et al., 2024, section 4.1)


def u_shaped(u: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Times with density ~ e^(a t) + e^(a (1 - t)), more near both ends, from uniform `u`.

    The inverse of the distribution function: t = (1 + asinh((2u - 1) sinh(a/2)) / (a/2)) / 2.
    """
    half = U_SHAPE / 2
    return 0.5 + torch.asinh((2 * u - 1) * sinh(half)) / (2 * half)


def flow_matching_term(
    batch: TrajectoryBatch, student: MeanVelocity, t: Float[Tensor, "B"], kind: str
) -> Float[Tensor, "B"]:
    """D( u(x_t, t, t), x_1 - x_0 ) per sample."""
    x_0, x_1 = batch.noise, batch.best[:, -1]
    return distance(kind, student(interpolate(x_0, x_1, t), t, t, batch.labels), x_1 - x_0)


class Reflow:
    """The baseline, and the loss of pre-training."""

    def __init__(self, config: ReflowConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        t = draw(self.seed, "reflow/t", step, batch)
        if self.config.times == "u_shaped":
            t = u_shaped(t)
        value = flow_matching_term(batch, student, t, self.config.distance)
        return weighted_sum({"flow_matching": (1.0, value)})
