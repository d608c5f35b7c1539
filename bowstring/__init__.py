"""Distil a flow model into a few-step student from a program or a notebook: no Ray, no cluster.

    import bowstring

    teacher = bowstring.load_teacher("runs/digits/teacher/models/step_00001000", guidance=2.0)
    pairs = bowstring.make_trajectories(teacher, 512)
    student = bowstring.make_student(teacher)
    objective = bowstring.make_objective("traflow")
    student = bowstring.train(student, pairs, objective, steps=100)
    images = student.sample(16, nfe=1)
    for row in bowstring.compare(student, teacher):
        print(row.nfe, row.student, row.teacher)
    student.save("student")

Everything happens in this process, so a breakpoint stops it. What a cluster adds stands behind the
command `bowstring`.
"""

from importlib.metadata import version

try:
    from bowstring.api import (
        Comparison,
        Teacher,
        Trajectories,
        compare,
        load_teacher,
        make_objective,
        make_student,
        make_trajectories,
        train,
    )
    from distill.config import ConfigError, ImageSpec
    from distill.flow.trajectory import TrajectoryBatch
    from distill.objectives.base import LossTerms, Objective
    from distill.sample import Student, load_student
    from distill.training.callbacks import Callback, Step
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the package {error.name} is missing; pip install 'bowstring[train]'", name=error.name
    ) from error

__version__ = version("bowstring")
__all__ = [
    "Callback",
    "Comparison",
    "ConfigError",
    "ImageSpec",
    "LossTerms",
    "Objective",
    "Step",
    "Student",
    "Teacher",
    "Trajectories",
    "TrajectoryBatch",
    "compare",
    "load_student",
    "load_teacher",
    "make_objective",
    "make_student",
    "make_trajectories",
    "train",
]
