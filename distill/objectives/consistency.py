"""Consistency trajectory model without the adversarial term (Kim et al., 2024), on stored states.

    L_con = D( G'(G(X_a, t_a, s), s, 1),  sg G'(G'(X_b, t_b, s), s, 1) ),   t_a < t_b <= s

G is the student, G' its average. X_b is the teacher's own solution from X_a, read from the shard,
so no teacher runs here. Both sides are carried to t = 1 by the same frozen map, where they are
compared as images; gradient reaches the student's jump through the input of that map.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from distill.config import ConsistencyConfig
from distill.objectives.base import LossTerms, distance, draw, draw_index, pick, weighted_sum
from distill.paths import MeanVelocity, jump
from distill.trajectory import TrajectoryBatch


def consistency_term(
    batch: TrajectoryBatch,
    student: MeanVelocity,
    target: MeanVelocity,
    seed: int,
    step: int,
    kind: str,
) -> Float[Tensor, "B"]:
    """L_con per sample, with a < b <= c drawn uniformly on the grid and s = t_c."""
    times, label = batch.times, batch.labels
    last = len(times) - 1
    a = draw_index(draw(seed, "consistency/a", step, batch), 0, last - 1)
    b = draw_index(draw(seed, "consistency/b", step, batch), a + 1, last)
    c = draw_index(draw(seed, "consistency/c", step, batch), b, last)
    s, one = times[c], torch.ones_like(times[c])

    from_a = jump(student, pick(batch.best, a), times[a], s, label)
    with torch.no_grad():
        from_b = jump(target, pick(batch.best, b), times[b], s, label)
        from_b = jump(target, from_b, s, one, label)
    return distance(kind, jump(target, from_a, s, one, label), from_b)


class Consistency:
    """The baseline: self-consistency alone."""

    def __init__(self, config: ConsistencyConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        value = consistency_term(batch, student, target, self.seed, step, self.config.distance)
        return weighted_sum({"consistency": (1.0, value)})
