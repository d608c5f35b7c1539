"""Settings of the teachers. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import check, check_choice, check_positive
from distill.flow.times import NFE_PER_STEP


@dataclass
class TeacherConfig:
    """One frozen teacher and how its ODE is solved.

    Several teachers may differ in everything but the shape of the images and the stored grid.
    """

    kind: str = "native"  # native | analytic | sit | diffusers | edm
    path: str = ""  # folder or file with the weights; native: also the folder of an earlier run
    solver: str = "heun"  # euler | heun | rk4 | jumps (of a student)
    steps: int = 16  # fixed solver steps from noise to data; a multiple of trajectory.grid
    guidance: float = 1.0  # scale w of v = v_null + w (v_label - v_null); 1 is off
    weight: float = 1.0  # convex weight among several teachers, before normalisation
    num_heads: int = 0  # of a SiT checkpoint, which does not tell; 0: that of the published size

    def __post_init__(self) -> None:
        check_choice("teacher.kind", self.kind, ("native", "analytic", "sit", "diffusers", "edm"))
        check_choice("teacher.solver", self.solver, tuple(NFE_PER_STEP))
        check(
            self.solver != "jumps" or (self.kind == "native" and self.guidance == 1),
            f"teacher.solver=jumps with teacher.kind={self.kind} and teacher.guidance="
            f"{self.guidance} cannot work: only a student jumps, and guidance is in it already; "
            "set teacher.kind=native and teacher.guidance=1",
        )
        check_positive("teacher", steps=self.steps, weight=self.weight)
