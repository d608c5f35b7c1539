"""What an evaluation draws: the rows of results.json and of the picture grid. Needs no torch, so
`bowstring estimate` counts the same rows that `distill.evaluate` computes.
"""

from __future__ import annotations

from distill.config import NFE_PER_STEP, EvalConfig, ImageSpec

TRUTH_SOLVER = "heun"
GRID_COLUMNS = 12
GRID_NFE = (1, 2, 4)
GRID_TEACHER_NFE = 64


def reference_nfe(evaluation: EvalConfig) -> int:
    """Velocity evaluations of the teacher's fine solution, the truth."""
    return evaluation.reference_steps * NFE_PER_STEP[TRUTH_SOLVER]


def is_truth(solver: str, nfe: int, evaluation: EvalConfig) -> bool:
    """Whether a row of the teacher is the fine solution itself, whose samples are there already."""
    return (solver, nfe) == (TRUTH_SOLVER, reference_nfe(evaluation))


def teacher_curves(own_solver: str, evaluation: EvalConfig) -> list[tuple[str, int]]:
    """(solver, NFE) of the teacher's rows: its own solver, then Euler.

    An NFE that is no whole number of solver steps is left out: Heun has no 1 NFE.
    """
    curves = {own_solver: evaluation.teacher_nfe}
    curves.setdefault("euler", evaluation.euler_nfe)
    return [
        (solver, nfe)
        for solver, counts in curves.items()
        for nfe in counts
        if nfe % NFE_PER_STEP[solver] == 0
    ]


def grid_rows(own_solver: str) -> list[tuple[str, str, int]]:
    """(who, how, NFE) of the rows of the picture grid, top to bottom."""
    return [
        ("teacher", own_solver, GRID_TEACHER_NFE),
        *(("student", "jumps", nfe) for nfe in GRID_NFE),
        *(("teacher", "euler", nfe) for nfe in GRID_NFE),
    ]


def grid_columns(num_samples: int, image: ImageSpec) -> int:
    """Columns of the picture grid: every class once where there are classes."""
    return min(GRID_COLUMNS, num_samples, image.num_classes or GRID_COLUMNS)
