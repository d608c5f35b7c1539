"""Lagrangian map distillation on the teacher's curve (Boffi et al., 2024, arXiv 2406.07507, and
2025, arXiv 2505.18825, whose LSD is the same with the student's own velocity):

    L = mean_i D( dG(X(t), t, s)/ds, dX/ds ),   G(x, t, s) = x + (s - t) u(x, t, s),   t <= s

They ask the velocity where the student lands, v(G(X(t), t, s), s). Ours asks where the teacher is,
X(s), whose velocity the curve has: no teacher is called, the student's error at s does not steer
its target, and both have one minimum, the flow map.

dG/ds = u + (s - t) du/ds has two forms. With b = max(s - h, t) and r = (b - t) / (s - b)

    finite_difference  (G(X(t), t, s) - G(X(t), t, b)) / (s - b) = u(s) + r (u(s) - u(b)),
                       gradient through both, against (X(s) - X(b)) / (s - b): exact for any h
    jvp                D( u, sg[ dX/ds - (s - t) du/ds ] )

For `share_diagonal` of the samples s = t, which is flow matching: D( u(X(t), t, t), dX/dt ).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.conditions.condition import Condition, joined
from distill.flow import paths
from distill.flow.curve import Curve, curve_through
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base, derivatives
from distill.objectives.config import LagrangianConfig

SHORTEST = 1e-4  # of a change that is a difference; below it is the slope


class Lagrangian:
    """The baseline: the Lagrangian flow-map identity."""

    def __init__(self, config: LagrangianConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self,
        batch: TrajectoryBatch,
        student: paths.MeanVelocity,
        target: paths.MeanVelocity,
        step: int,
    ) -> base.LossTerms:
        share = self.config.share_diagonal
        t, other = (base.draw(self.seed, f"lagrangian/{name}", step, batch) for name in "ts")
        diagonal = base.draw_strata(self.seed, "lagrangian/diagonal", step, batch) < share
        t, s = torch.minimum(t, other).where(~diagonal, t), torch.maximum(t, other)
        s = s.where(~diagonal, t)
        curve = curve_through(batch.best, batch.times, batch.best_velocities)
        if share == 1:
            (x, goal), condition = curve.at(t), batch.condition
            slope = student(x, t, s, condition)
        elif self.config.derivative == "jvp":
            slope, goal = exact_slope(curve, student, t, s, _off(diagonal), batch.condition)
        else:
            slope, goal = slope_by_difference(curve, student, t, s, _off(diagonal), batch.condition)
        return base.by_share(
            self.distances.velocities(slope, goal),
            {"flow_matching": (share, diagonal), "map": (1 - share, ~diagonal)},
        )


def slope_by_difference(
    curve: Curve,
    student: paths.MeanVelocity,
    t: Float[Tensor, "B"],
    s: Float[Tensor, "B"],
    rows: Int[Tensor, "R"],
    condition: Condition,
) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"]]:
    """The change of G over [b, s] by s - b, with gradient, and that of X; b is asked for in `rows`,
    which are all samples with t < s.
    """
    before = torch.maximum(s - derivatives.FINITE_STEP, t)
    (x, _), (behind, _), (ahead, slope) = curve.at(t), curve.at(before), curve.at(s)
    gap, wide = s - before, paths.expand_as(s - before, x)
    goal = torch.where(wide > SHORTEST, (ahead - behind) / wide.clamp_min(SHORTEST), slope)
    ratio = torch.where(gap > SHORTEST, (before - t) / gap.clamp_min(SHORTEST), 0)[rows]
    x_2, t_2, s_2 = torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), torch.cat([s, before[rows]])
    both = student(x_2, t_2, s_2, joined([condition, condition[rows]]))
    u, u_before = both.split([len(x), len(rows)])
    rise = u[rows] - u_before
    return u.index_add(0, rows, paths.expand_as(ratio, rise) * rise), goal


def exact_slope(
    curve: Curve,
    student: paths.MeanVelocity,
    t: Float[Tensor, "B"],
    s: Float[Tensor, "B"],
    rows: Int[Tensor, "R"],
    condition: Condition,
) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"]]:
    """u, with gradient, and dX/ds - (s - t) du/ds without; `rows` are all samples with t < s."""
    (x, _), (_, slope) = curve.at(t), curve.at(s)
    u = student(x, t, s, condition)
    du_ds = derivatives.time_derivative(student, x[rows], t[rows], s[rows], condition[rows])
    return u, slope.index_add(0, rows, paths.expand_as((t - s)[rows], du_ds) * du_ds)


def _off(diagonal: Bool[Tensor, "B"]) -> Int[Tensor, "R"]:
    """The samples with t < s; where a rank has none, its first, which changes nothing: all ranks
    make the same calls.
    """
    rows = (~diagonal).nonzero()[:, 0]
    return rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=diagonal.device)
