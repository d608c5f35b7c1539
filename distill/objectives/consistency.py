"""Consistency trajectory model without the adversarial term (Kim et al., 2024), on stored states.

    L_con = D( G'(G(X_a, t_a, s), s, 1),  sg G'(G'(X_b, t_b, s), s, 1) ),   t_a < t_b <= s

G is the student, G' its average. X_b is the teacher's own solution from X_a, read from the shard,
so no teacher runs here. Both sides are carried to t = 1 by the same frozen map, where they are
compared as images; gradient reaches the student's jump through the input of that map.
"""

import torch
from jaxtyping import Float

from distill.flow.paths import MeanVelocity, jump
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base
from distill.objectives.config import ConsistencyConfig


def consistency_term(
    batch: TrajectoryBatch,
    target: MeanVelocity,
    seed: int,
    step: int,
    distance: base.Distance,
    weight: float,
) -> base.Term:
    """L_con, with a < b <= c drawn uniformly on the grid and s = t_c."""
    times, condition = batch.times, batch.condition
    last = len(times) - 1
    a = base.draw_index(base.draw(seed, "consistency/a", step, batch), 0, last - 1)
    b = base.draw_index(base.draw(seed, "consistency/b", step, batch), a + 1, last)
    c = base.draw_index(base.draw(seed, "consistency/c", step, batch), b, last)
    s, one = times[c], torch.ones_like(times[c])
    from_a = base.Call(base.pick(batch.best, a), times[a], s)

    def value(u: Float[torch.Tensor, "B *S"]) -> Float[torch.Tensor, "B"]:
        with torch.no_grad():
            goal = jump(target, base.pick(batch.best, b), times[b], s, condition)
            goal = jump(target, goal, s, one, condition)
        return distance(jump(target, from_a.landing(u), s, one, condition), goal)

    return base.Term(weight, [from_a], value)


class Consistency:
    """The baseline: self-consistency alone."""

    def __init__(self, config: ConsistencyConfig, distances: base.Distances, seed: int) -> None:
        self.distances, self.seed = distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        term = consistency_term(batch, target, self.seed, step, self.distances.states, 1.0)
        return base.loss_terms({"consistency": term}, student, batch.condition)
