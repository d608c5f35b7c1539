"""MeanFlow on pairs (Geng et al., 2025): D( u(x_t, t, s), sg[ v + (s - t) du/dt ] ).

x_t = (1 - t) x_0 + t x_1 and v = x_1 - x_0 on the teacher's pairs. With chance `p_diagonal` s = t,
which is plain flow matching.
"""

from jaxtyping import Float
from torch import Tensor

from distill.flow.paths import MeanVelocity, interpolate
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base, derivatives
from distill.objectives.config import MeanFlowConfig


class MeanFlow:
    """The baseline: the Eulerian flow-map identity."""

    def __init__(self, config: MeanFlowConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        t = base.draw(self.seed, "meanflow/t", step, batch)
        s = t + (1 - t) * base.draw(self.seed, "meanflow/s", step, batch)
        s = s.where(
            base.draw(self.seed, "meanflow/diagonal", step, batch) >= self.config.p_diagonal, t
        )
        x_0, x_1, label = batch.noise, batch.best[:, -1], batch.labels
        call = base.Call(interpolate(x_0, x_1, t), t, s)

        def value(u: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
            goal = derivatives.eulerian_target(
                student, u, call, x_1 - x_0, label, self.config.derivative
            )
            return self.distances.velocities(u, goal)

        return base.loss_terms({"map": base.Term(1.0, [call], value)}, student, label)
