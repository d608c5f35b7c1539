"""TraFlow: trajectory distillation of a rectified flow (arXiv 2502.16972; docs/method.md).

    L = w_out L_out + w_vel L_vel + w_con L_con + w_fm L_fm

    L_out = D( G(X_a, t_a, t_b), X_b )                  the teacher's output and states between
    L_vel = D( dG(x_t, t, s)/ds, teacher's change at s )  its velocity
    L_con = self-consistency along the trajectory       see `consistency_term`
    L_fm  = D( u(x_t, t, t), x_1 - x_0 )                an anchor on the diagonal

G(x, t, s) = x + (s - t) u(x, t, s). X_0 .. X_K are the best teacher's states on the stored grid.
A term of weight 0 is not computed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from distill.config import TraFlowConfig
from distill.objectives.base import LossTerms, distance, draw, draw_index, pick, weighted_sum
from distill.objectives.consistency import consistency_term
from distill.objectives.reflow import flow_matching_term
from distill.paths import MeanVelocity, expand_as, interpolate, jump
from distill.trajectory import TrajectoryBatch


class TraFlow:
    """Output, velocity and self-consistency targets."""

    def __init__(self, config: TraFlowConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        config, terms = self.config, {}
        if config.weight_output > 0:
            terms["output"] = (config.weight_output, self.output_term(batch, student, step))
        if config.weight_velocity > 0:
            terms["velocity"] = (config.weight_velocity, self.velocity_term(batch, student, step))
        if config.weight_consistency > 0:
            value = consistency_term(batch, student, target, self.seed, step, config.distance)
            terms["consistency"] = (config.weight_consistency, value)
        if config.weight_flow_matching > 0:
            t = draw(self.seed, "flow_matching/t", step, batch)
            value = flow_matching_term(batch, student, t, config.distance)
            terms["flow_matching"] = (config.weight_flow_matching, value)
        return weighted_sum(terms)

    def output_term(
        self, batch: TrajectoryBatch, student: MeanVelocity, step: int
    ) -> Float[Tensor, "B"]:
        """L_out per sample: a = 0, b = K with chance `p_full`, else a < b uniform on the grid."""
        last = len(batch.times) - 1
        full = draw(self.seed, "output/full", step, batch) < self.config.p_full
        a = draw_index(draw(self.seed, "output/a", step, batch), 0, last - 1)
        b = draw_index(draw(self.seed, "output/b", step, batch), a + 1, last)
        a, b = a.where(~full, torch.zeros_like(a)), b.where(~full, torch.full_like(b, last))
        x_a, x_b = pick(batch.best, a), pick(batch.best, b)
        output = jump(student, x_a, batch.times[a], batch.times[b], batch.labels)
        return distance(self.config.distance, output, x_b)

    def velocity_term(
        self, batch: TrajectoryBatch, student: MeanVelocity, step: int
    ) -> Float[Tensor, "B"]:
        """L_vel per sample, by the change of G over one grid interval [s, s + h].

        trajectory: x_t = X_a; ( G(X_a, t_a, t_{b+1}) - G(X_a, t_a, t_b) ) / h against
                    ( X_{b+1} - X_b ) / h, a <= b. It agrees with the teacher's own flow map.
        straight:   x_t = (1 - t_a) x_0 + t_a x_1, against x_1 - x_0. It agrees with the flow map
                    of the reflowed model, and with the teacher's only where its paths are straight.
        """
        times, label = batch.times, batch.labels
        last = len(times) - 1
        a = draw_index(draw(self.seed, "velocity/a", step, batch), 0, last - 1)
        b = draw_index(draw(self.seed, "velocity/b", step, batch), a, last - 1)
        t, s, ahead = times[a], times[b], times[b + 1]
        if self.config.velocity_mode == "trajectory":
            x_t = pick(batch.best, a)
            change = pick(batch.best, b + 1) - pick(batch.best, b)
            slope = change / expand_as(ahead - s, change)
        else:
            x_0, x_1 = batch.noise, batch.best[:, -1]
            x_t, slope = interpolate(x_0, x_1, t), x_1 - x_0
        rise = jump(student, x_t, t, ahead, label) - jump(student, x_t, t, s, label)
        return distance(self.config.distance, rise / expand_as(ahead - s, rise), slope)
