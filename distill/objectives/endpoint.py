"""Distillation of a rectified flow (Liu et al., 2023): D( G(x_0, 0, 1), X_K )."""

import torch

from distill.config import EndpointConfig
from distill.objectives.base import LossTerms, distance, weighted_sum
from distill.paths import MeanVelocity, jump
from distill.trajectory import TrajectoryBatch


class Endpoint:
    """The baseline: one jump from noise to the teacher's output."""

    def __init__(self, config: EndpointConfig, seed: int) -> None:
        self.config = config

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        x_0 = batch.noise
        zero = torch.zeros(len(x_0), device=x_0.device, dtype=x_0.dtype)
        output = jump(student, x_0, zero, zero + 1, batch.labels)
        value = distance(self.config.distance, output, batch.best[:, -1])
        return weighted_sum({"output": (1.0, value)})
