"""MeanFlow (Geng et al., 2025, arXiv 2505.13447, eq. 6 to 11), with time reversed:

    L = mean_i w_i D( u(x_t, t, s), g ),   g = sg[ v + (s - t) du/dt ],   t <= s
    w = sg[ 1 / (|e|^2 + c)^p ],   e = u(x_t, t, s) - g

    path          x_t                          v = dx/dt
    straight      (1 - t) x_0 + t x_1          x_1 - x_0, on the teacher's pairs
    curve         X(t)                         dX/dt, on the teacher's curve

Of two logit-normal times, logit t ~ N(m, std^2), the earlier is t and the later s. Theirs has the
noise at 1, so our m is minus theirs. With chance `p_diagonal` s = t, which is plain flow matching.
The value that is returned is that of D alone, the gradient that of w D.

On the curve it is the Eulerian map distillation of Align Your Flow (Sabour et al., 2025, arXiv
2506.14603): f(x, t) = x + (s - t) u has the derivative df/dt = -e there, and their normalised
tangent e / (|e| + 0.1) is p = 1/2 with c = 0.01, nearly. Their teacher is called at x_t; ours has
been there already, and its velocity is the curve's.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from distill.flow.paths import MeanVelocity
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base
from distill.objectives.config import MeanFlowConfig
from distill.objectives.derivatives import eulerian_target
from distill.objectives.distances import squared_gap


class MeanFlow:
    """The baseline: the Eulerian flow-map identity."""

    def __init__(self, config: MeanFlowConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        config, condition = self.config, batch.condition
        t, s = draw_jump(config, self.seed, step, batch)
        x, v = base.on_path(config.path, batch, t)
        call = base.Call(x, t, s)

        def value(u: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
            goal = eulerian_target(student, u, call, v, condition, config.derivative)
            off = self.distances.velocities(u, goal)
            if config.adaptive_power == 0:
                return off
            size = squared_gap(u.detach(), goal) + config.adaptive_floor
            weighted = off / size**config.adaptive_power
            # Its value says nothing: with p = 1 it is 1 at any error. That of D is shown.
            return weighted + (off - weighted).detach()

        return base.loss_terms({"map": base.Term(1.0, [call], value)}, student, condition)


def draw_jump(
    config: MeanFlowConfig, seed: int, step: int, batch: TrajectoryBatch
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """t <= s."""
    t, other = (base.draw(seed, f"meanflow/{name}", step, batch) for name in "ts")
    if config.times == "after":
        s = t + (1 - t) * other
    else:
        if config.times == "logit_normal":
            t, other = (
                torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
                for u in (t, other)
            )
        t, s = torch.minimum(t, other), torch.maximum(t, other)
    return t, s.where(base.draw(seed, "meanflow/diagonal", step, batch) >= config.p_diagonal, t)
