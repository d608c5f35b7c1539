"""Frozen teachers by configuration. Each adapter converts its model to our convention, t = 0 noise.

| kind      | `teacher.path` is                                                            |
|-----------|------------------------------------------------------------------------------|
| native    | a model folder: `bowstring pretrain` or `bowstring export` wrote it; to the    |
|           | command line also the folder of an earlier run, for its student               |
| analytic  | a name of `analytic.PRESETS`, or a JSON file with a Gaussian mixture          |
| sit       | a checkpoint of the public SiT code, `.pt` or `.safetensors`                  |
| diffusers | a folder with one flow-matching model: config.json and its safetensors        |
| edm       | a model folder whose network was trained with EDM's preconditioning           |
"""

from pathlib import Path

import torch

from distill.config import ConfigError, check
from distill.teachers.analytic import load_analytic
from distill.teachers.base import FrozenTeacher, Guided, guided
from distill.teachers.config import TeacherConfig
from distill.teachers.diffusers import load_diffusers
from distill.teachers.edm import load_edm
from distill.teachers.native import Jumps, NativeTeacher
from distill.teachers.sit import load_sit


def build_teacher(config: TeacherConfig, device: torch.device | str) -> FrozenTeacher:
    """The teacher of `config` on `device`.

    Raises:
        ConfigError: its files are missing, cut, or of another model.
    """
    check(config.path != "", f"teacher.path is empty; teacher.kind={config.kind} needs one")
    path = Path(config.path)
    match config.kind:
        case "native":
            return _load_native(path, config.guidance, device)
        case "analytic":
            return load_analytic(config.path, device)
        case "sit":
            return load_sit(path, config.num_heads, device)
        case "diffusers":
            return load_diffusers(path, device)
        case "edm":
            return load_edm(path, device)
    raise ConfigError(f"teacher.kind={config.kind} is not known")


def _load_native(path: Path, guidance: float, device: torch.device | str) -> NativeTeacher:
    teacher = NativeTeacher(path, device)
    check(
        not teacher.is_student or teacher.image.num_classes == 0 or guidance == 1,
        f"teacher.guidance={guidance} with the student {path} as teacher: a student has "
        'learned the guided field and knows no label "none"; set teacher.NAME.guidance=1',
    )
    return teacher


def build_field(teacher: FrozenTeacher, config: TeacherConfig) -> Guided:
    """What the solver of `config` evaluates: the guided velocity, or a student's mean velocity.

    Raises:
        ConfigError: guidance of a teacher that has no classes.
    """
    if config.solver != "jumps":
        return guided(teacher, config.guidance)
    assert isinstance(teacher, NativeTeacher)
    return Jumps(teacher)
