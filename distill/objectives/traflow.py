"""TraFlow: trajectory distillation of a rectified flow (arXiv 2502.16972; docs/method.md).

Its three targets, the teacher's output, the amount of change by the teacher, and self-consistency
along the trajectory, are drawn on the curve of the best teacher: `distill.objectives.drawn` has
the equation. The sum of terms, with the velocity as a derivative, is `distill.objectives.summed`.
"""

from distill.flow.curve import curve_through
from distill.flow.paths import MeanVelocity
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base, drawn
from distill.objectives.config import TraFlowConfig


class TraFlow:
    """Drawn targets on the curve of the last, best teacher."""

    def __init__(self, config: TraFlowConfig, distances: base.Distances, seed: int) -> None:
        self.config, self.distances, self.seed = config, distances, seed

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        curve = curve_through(batch.best, batch.times, batch.best_velocities)
        return drawn.drawn_terms(
            self.config, self.distances, self.seed, curve, batch, student, target, step
        )
