"""Shortcut models (Frans et al., 2024, arXiv 2410.12557, eq. 4 and 5):

    L = mean_i D( u(x_t, t, t + 2d), sg[ (v_1 + v_2) / 2 ] ) + D( u(x_t, t, t), dx/dt )

    v_1 = u'(x_t, t, t + d),   v_2 = u'(x_t + d v_1, t + d, t + 2d)

u' is the student's average: two of its half jumps are the target of a whole one. d is 1 / 2, 1 / 4
.. 1 / `shortest`, each as often, and t a multiple of 2d. Half jumps of the shortest d are not
trained: there v_1 and v_2 are velocities, u'(x, t, t). x_t and dx/dt are those of the pair, or of
the teacher's curve (`path`). For `share_diagonal` of the samples it is the second term, flow
matching, with t uniform; for the others the first.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from distill.conditions.condition import Condition
from distill.flow.paths import MeanVelocity, expand_as
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base
from distill.objectives.config import ShortcutConfig


class Shortcut:
    """The baseline: self-consistency of jumps of twice the length."""

    def __init__(self, config: ShortcutConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        share, condition = self.config.share_diagonal, batch.condition
        t = base.draw(self.seed, "shortcut/t", step, batch)
        diagonal = base.draw_strata(self.seed, "shortcut/diagonal", step, batch) < share
        half = self.draw_half(step, batch)
        t = t.where(diagonal, 2 * half * (t / (2 * half)).floor())
        half = half.where(~diagonal, 0)
        x, goal = base.on_path(self.config.path, batch, t)
        if share < 1:
            off = (~diagonal).nonzero()[:, 0]
            # A rank that drew none asks for one in vain, since all must make the same calls.
            rows = off if len(off) else torch.zeros(1, dtype=torch.int64, device=x.device)
            mean = self.two_halves(target, x[rows], t[rows], half[rows], condition[rows])
            goal = goal.index_copy(0, off, mean[: len(off)])
        u = student(x, t, t + 2 * half, condition)
        return base.by_share(
            self.distances.velocities(u, goal),
            {"flow_matching": (share, diagonal), "shortcut": (1 - share, ~diagonal)},
        )

    def draw_half(self, step: int, batch: TrajectoryBatch) -> Float[Tensor, "B"]:
        """d."""
        levels = self.config.shortest.bit_length() - 1
        level = base.draw_index(base.draw(self.seed, "shortcut/d", step, batch), 1, levels)
        return torch.pow(2.0, -level).to(batch.times)

    @torch.no_grad()
    def two_halves(
        self,
        target: MeanVelocity,
        x: Float[Tensor, "R *S"],
        t: Float[Tensor, "R"],
        half: Float[Tensor, "R"],
        condition: Condition,
    ) -> Float[Tensor, "R *S"]:
        """(v_1 + v_2) / 2."""
        asked = half.where(half > 1 / self.config.shortest, 0)
        first = target(x, t, t + asked, condition)
        onward, later = x + expand_as(half, x) * first, t + half
        return (first + target(onward, later, later + asked, condition)) / 2
