"""Frozen teachers by configuration. Each adapter converts its model to our convention, t = 0 noise.

What `teacher.path` is stands at the settings of each kind (`distill.teachers.config`).
"""

from pathlib import Path

import torch

from distill.config import ConfigError, check
from distill.networks.files import load_model
from distill.networks.layers import AbstractNetwork
from distill.teachers.analytic import describe_analytic, load_analytic
from distill.teachers.base import (
    FrozenTeacher,
    Guided,
    Jumps,
    NetworkTeacher,
    TeacherDescription,
    guided,
)
from distill.teachers.config import (
    AnalyticConfig,
    DiffusersConfig,
    EdmConfig,
    NativeConfig,
    SiTConfig,
    TeacherConfig,
)
from distill.teachers.diffusers import describe_diffusers, load_diffusers
from distill.teachers.edm import describe_edm, load_edm
from distill.teachers.native import describe_native, load_native
from distill.teachers.sit import describe_sit, load_sit, load_sit_network


def describe(config: TeacherConfig) -> TeacherDescription:
    """What `build_teacher` would build, from headers and hashes: no weight is loaded.

    Raises:
        ConfigError: its files are missing, cut, or of another model.
    """
    _check_path(config)
    match config:
        case NativeConfig():
            return describe_native(config)
        case AnalyticConfig():
            return describe_analytic(config)
        case SiTConfig():
            return describe_sit(config)
        case DiffusersConfig():
            return describe_diffusers(config)
        case EdmConfig():
            return describe_edm(config)
    raise ConfigError(f"teacher.kind={config.kind} is not known")


def build_teacher(config: TeacherConfig, device: torch.device | str) -> FrozenTeacher:
    """The teacher of `config` on `device`.

    Raises:
        ConfigError: its files are missing, cut, or of another model.
    """
    _check_path(config)
    match config:
        case NativeConfig():
            return load_native(config, device)
        case AnalyticConfig():
            return load_analytic(config, device)
        case SiTConfig():
            return load_sit(config, device)
        case DiffusersConfig():
            return load_diffusers(config, device)
        case EdmConfig():
            return load_edm(config, device)
    raise ConfigError(f"teacher.kind={config.kind} is not known")


def _check_path(config: TeacherConfig) -> None:
    check(config.path != "", f"teacher.path is empty; teacher.kind={config.kind} needs one")


def start_of(config: TeacherConfig) -> AbstractNetwork | None:
    """The network, on the CPU, whose u(x, t, t) is the teacher's velocity: a student's start.

    None where there is none: the teacher is of another architecture, or its output is converted.

    Raises:
        ConfigError: its files are missing, cut, or of another model.
    """
    match config:
        case NativeConfig():
            return load_model(Path(config.path), "cpu")[0]
        case SiTConfig():
            return load_sit_network(config, "cpu")
    return None


def build_field(teacher: FrozenTeacher, config: TeacherConfig) -> Guided:
    """What the solver of `config` evaluates: the guided velocity, or a student's mean velocity.

    Raises:
        ConfigError: guidance of a teacher that has no classes.
    """
    if config.solver != "jumps":
        return guided(teacher, config.guidance)
    assert isinstance(teacher, NetworkTeacher)
    return Jumps(teacher)
