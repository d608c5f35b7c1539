"""MeanFlow on pairs (Geng et al., 2025): D( u(x_t, t, s), sg[ v + (s - t) du/dt ] ).

x_t = (1 - t) x_0 + t x_1 and v = x_1 - x_0 on the teacher's pairs. With chance `p_diagonal` s = t,
which is plain flow matching.
"""

from distill.config import MeanFlowConfig
from distill.objectives.base import LossTerms, distance, draw, eulerian_target, weighted_sum
from distill.paths import MeanVelocity, interpolate
from distill.trajectory import TrajectoryBatch


class MeanFlow:
    """The baseline: the Eulerian flow-map identity."""

    def __init__(self, config: MeanFlowConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        t = draw(self.seed, "meanflow/t", step, batch)
        s = t + (1 - t) * draw(self.seed, "meanflow/s", step, batch)
        s = s.where(draw(self.seed, "meanflow/diagonal", step, batch) >= self.config.p_diagonal, t)
        x_0, x_1 = batch.noise, batch.best[:, -1]
        x_t = interpolate(x_0, x_1, t)
        goal = eulerian_target(student, x_t, x_1 - x_0, t, s, batch.labels, self.config.derivative)
        value = distance(self.config.distance, student(x_t, t, s, batch.labels), goal)
        return weighted_sum({"map": (1.0, value)})
