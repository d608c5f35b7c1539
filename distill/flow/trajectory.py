"""TrajectoryBatch: what a trainer reads. Named fields, so objectives have no words of their own."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.conditions.condition import Condition


@dataclass
class TrajectoryBatch:
    """Teacher trajectories of one rank's share of a global batch.

    Attributes:
        states: X [B, M, K+1, C, H, W] float32, images in [-1, 1]; M teachers on shared noise,
            weakest first. State 0 is the noise x_0 (the same for every teacher), state K the
            teacher's output.
        times: of the states, t_0 = 0 .. t_K = 1; equally spaced unless some were not stored.
        weights: convex weight of each teacher for each sample; a sample's sum to 1.
        condition: of each sample.
        ids: sample ids.
        positions: index of each sample within the global batch. Random draws are taken per
            position, so a loss does not depend on how the batch is split over ranks.
        global_size: samples in the global batch.
        velocities: of the teachers at every state, where they are stored.
    """

    states: Float[Tensor, "B M K1 *S"]
    times: Float[Tensor, "K1"]
    weights: Float[Tensor, "B M"]
    condition: Condition
    ids: Int[Tensor, "B"]
    positions: Int[Tensor, "B"]
    global_size: int
    velocities: Float[Tensor, "B M K1 *S"] | None = None

    @property
    def noise(self) -> Float[Tensor, "B *S"]:
        """x_0."""
        return self.states[:, 0, 0]

    @property
    def best(self) -> Float[Tensor, "B K1 *S"]:
        """The trajectory of the last, best teacher."""
        return self.states[:, -1]

    @property
    def best_velocities(self) -> Float[Tensor, "B K1 *S"] | None:
        """Its velocities, where they are stored."""
        return None if self.velocities is None else self.velocities[:, -1]

    @property
    def outputs(self) -> Float[Tensor, "B M *S"]:
        """The output of every teacher."""
        return self.states[:, :, -1]

    def to(self, device: torch.device) -> "TrajectoryBatch":
        """The batch on `device`."""
        tensors = ("times", *self._by_sample())
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def split(self, parts: int) -> list["TrajectoryBatch"]:
        """`parts` micro-batches of equal size."""
        size, rest = divmod(len(self.ids), parts)
        if rest:
            raise ValueError(f"{len(self.ids)} samples cannot be split into {parts} equal parts")
        return [
            replace(
                self, **{n: getattr(self, n)[i * size : (i + 1) * size] for n in self._by_sample()}
            )
            for i in range(parts)
        ]

    def _by_sample(self) -> list[str]:
        """Names of the fields that have a row for each sample."""
        names = ["states", "weights", "condition", "ids", "positions"]
        return names if self.velocities is None else [*names, "velocities"]

    def check(self) -> None:
        """Raises ValueError when the fields contradict each other."""
        batch, teachers, points = self.states.shape[:3]
        if len(self.times) != points or self.times[0] != 0 or self.times[-1] != 1:
            raise ValueError(f"times {self.times.tolist()} must be {points} values from 0 to 1")
        if not bool((self.times.diff() > 0).all()):
            raise ValueError(f"times {self.times.tolist()} do not increase")
        if self.weights.shape[1:] != (teachers,):
            raise ValueError(f"weights {list(self.weights.shape)} for {teachers} teachers")
        if self.velocities is not None and self.velocities.shape != self.states.shape:
            shapes = f"{list(self.velocities.shape)} for states {list(self.states.shape)}"
            raise ValueError(f"velocities {shapes}")
        for name in ("weights", "condition", "ids", "positions"):
            if len(getattr(self, name)) != batch:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for a batch of {batch}"
                )


@dataclass(frozen=True)
class GeneratedShard:
    """Trajectories of consecutive sample ids, on the CPU.

    Attributes:
        states: [N, M, P, C, H, W] float32 at the P stored points of the grid; state 0 is the noise,
            the same for every teacher.
        labels: number of each sample's condition, -1 for "none".
        ids: sample ids.
        nfe: evaluations of the guided velocity, summed over samples and teachers.
        forwards: samples that went through a network: guidance costs two forwards an evaluation.
        batch_size: samples that were integrated at once, in the end; less than was asked for when
            memory ran out.
        velocities: at the same points, if they are to be stored.
    """

    states: Float[Tensor, "N M P *S"]
    labels: Int[np.ndarray, "N"]
    ids: Int[np.ndarray, "N"]
    nfe: int
    forwards: int
    batch_size: int
    velocities: Float[Tensor, "N M P *S"] | None = None
