"""What an evaluation draws: the rows of results.json and of the picture grid. Needs no torch, so
`bowstring estimate` counts the same rows that `distill.evaluation.evaluate` computes.
"""

from distill.config import ImageSpec
from distill.evaluation.config import EvalConfig
from distill.flow.times import NFE_PER_STEP
from distill.teachers.config import TeacherConfig

GRID_COLUMNS = 12
GRID_NFE = (1, 2, 4)
GRID_TEACHER_NFE = 64


def truth(teacher: TeacherConfig, evaluation: EvalConfig) -> tuple[str, int]:
    """(solver, NFE) of the teacher's fine solution. A student that jumps is its own: finer jumps
    would be another model's.
    """
    if teacher.solver == "jumps":
        return "jumps", teacher.steps
    return "heun", evaluation.reference_steps * NFE_PER_STEP["heun"]


def teacher_curves(teacher: TeacherConfig, evaluation: EvalConfig) -> list[tuple[str, int]]:
    """(solver, NFE) of the teacher's rows: its own solver, then Euler.

    An NFE that is no whole number of solver steps is left out: Heun has no 1 NFE. A student that
    jumps has at most the jumps it is used with, and no Euler.
    """
    if teacher.solver == "jumps":
        return [("jumps", nfe) for nfe in evaluation.teacher_nfe if nfe <= teacher.steps]
    curves = {teacher.solver: evaluation.teacher_nfe}
    curves.setdefault("euler", evaluation.euler_nfe)
    return [
        (solver, nfe)
        for solver, counts in curves.items()
        for nfe in counts
        if nfe % NFE_PER_STEP[solver] == 0
    ]


def grid_rows(teacher: TeacherConfig) -> list[tuple[str, str, int]]:
    """(who, how, NFE) of the rows of the picture grid, top to bottom."""
    is_student = teacher.solver == "jumps"
    return [
        ("teacher", teacher.solver, teacher.steps if is_student else GRID_TEACHER_NFE),
        *(("student", "jumps", nfe) for nfe in GRID_NFE),
        *(("teacher", "euler", nfe) for nfe in GRID_NFE if not is_student),
    ]


def grid_columns(num_samples: int, image: ImageSpec) -> int:
    """Columns of the picture grid: every class once where there are classes."""
    return min(GRID_COLUMNS, num_samples, image.num_classes or GRID_COLUMNS)
