"""Progressive distillation (Salimans and Ho, 2022, arXiv 2202.00512), on the teacher's curve:

    L = mean_i D( u(X(t), t, s), (X(s) - X(t)) / (s - t) ),   t = k / N,  s = (k + 1) / N

k is uniform in 0 .. N - 1. N is `jumps` at first and halves from phase to phase, down to 1; all
phases are equally long. In the paper a phase's target are two jumps of the student of the phase
before, which stand for the teacher. Here the teacher's own states are stored, and where two of its
steps end is known: no student is kept, and no error is handed on.
"""

from distill.flow.curve import curve_through
from distill.flow.paths import MeanVelocity, expand_as
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base
from distill.objectives.config import ProgressiveConfig


class Progressive:
    """The baseline: fewer jumps from phase to phase."""

    def __init__(
        self, config: ProgressiveConfig, distances: base.Distances, seed: int, max_steps: int
    ) -> None:
        """`max_steps` is the length of the training, which the phases share."""
        self.config, self.distances, self.seed = config, distances, seed
        self.max_steps = max_steps

    def jumps(self, step: int) -> int:
        """N at a step of the training."""
        phases = self.config.jumps.bit_length()
        return self.config.jumps >> min(step * phases // self.max_steps, phases - 1)

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        count = self.jumps(step)
        place = base.draw_index(base.draw(self.seed, "progressive/t", step, batch), 0, count - 1)
        t, s = place.to(batch.times) / count, (place + 1).to(batch.times) / count
        curve = curve_through(batch.best, batch.times, batch.best_velocities)
        (x, _), (goal, _) = curve.at(t), curve.at(s)
        off = self.distances.velocities(
            student(x, t, s, batch.condition), (goal - x) / expand_as(s - t, x)
        )
        return base.LossTerms({"jumps": 1.0}, {"jumps": off.mean()})
