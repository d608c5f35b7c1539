"""Frozen teachers by configuration. Each adapter converts its model to our convention, t = 0 noise.

What `teacher.path` is stands at the settings of each kind (`distill.teachers.config`).
"""

from pathlib import Path

import torch

from distill.config import ConfigError, check
from distill.networks import files, layers
from distill.teachers import analytic, base, diffusers, edm, native, sit
from distill.teachers.config import (
    AnalyticConfig,
    DiffusersConfig,
    EdmConfig,
    NativeConfig,
    SiTConfig,
    TeacherConfig,
)


def describe(config: TeacherConfig) -> base.TeacherDescription:
    """What `build_teacher` would build, from headers and hashes: no weight is loaded.

    Raises:
        ConfigError: its files are missing, cut, or of another model.
    """
    _check_path(config)
    match config:
        case NativeConfig():
            return native.describe_native(config)
        case AnalyticConfig():
            return analytic.describe_analytic(config)
        case SiTConfig():
            return sit.describe_sit(config)
        case DiffusersConfig():
            return diffusers.describe_diffusers(config)
        case EdmConfig():
            return edm.describe_edm(config)
    raise ConfigError(f"teacher.kind={config.kind} is not known")


def build_teacher(config: TeacherConfig, device: torch.device | str) -> base.FrozenTeacher:
    """The teacher of `config` on `device`.

    Raises:
        ConfigError: its files are missing, cut, or of another model.
    """
    _check_path(config)
    match config:
        case NativeConfig():
            return native.load_native(config, device)
        case AnalyticConfig():
            return analytic.load_analytic(config, device)
        case SiTConfig():
            return sit.load_sit(config, device)
        case DiffusersConfig():
            return diffusers.load_diffusers(config, device)
        case EdmConfig():
            return edm.load_edm(config, device)
    raise ConfigError(f"teacher.kind={config.kind} is not known")


def _check_path(config: TeacherConfig) -> None:
    check(config.path != "", f"teacher.path is empty; teacher.kind={config.kind} needs one")


def start_of(config: TeacherConfig) -> layers.AbstractNetwork | None:
    """The network, on the CPU, whose u(x, t, t) is the teacher's velocity: a student's start.

    None where there is none: the teacher is of another architecture, or its output is converted.

    Raises:
        ConfigError: its files are missing, cut, or of another model.
    """
    match config:
        case NativeConfig():
            return files.load_model(Path(config.path), "cpu")[0]
        case SiTConfig():
            return sit.load_sit_network(config, "cpu")
    return None


def build_field(teacher: base.FrozenTeacher, config: TeacherConfig) -> base.Guided:
    """What the solver of `config` evaluates: the guided velocity, or a student's mean velocity.

    Raises:
        ConfigError: guidance of a teacher that has no classes.
    """
    if config.solver != "jumps":
        return base.guided(teacher, config.guidance)
    assert isinstance(teacher, base.NetworkTeacher)
    return base.Jumps(teacher)
