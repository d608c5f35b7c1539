"""Frozen teachers by configuration. Each adapter converts its model to our convention, t = 0 noise.

What `teacher.path` is stands at the settings of each kind (`distill.teachers.config`).
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from distill.config import ConfigError, check
from distill.networks import files, layers
from distill.networks.config import Edm2UNetConfig, EdmUNetConfig
from distill.teachers import analytic, base, checkpoint, conventions, diffusers, edm, native
from distill.teachers.config import (
    AnalyticConfig,
    CheckpointConfig,
    ConventionConfig,
    DiffusersConfig,
    EdmConfig,
    NativeConfig,
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
        case DiffusersConfig():
            return diffusers.describe_diffusers(config)
        case EdmConfig() if edm.is_folder(config):
            return edm.describe_edm(config)
        case CheckpointConfig():
            return checkpoint.open_checkpoint(config).description
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
        case DiffusersConfig():
            return diffusers.load_diffusers(config, device)
        case EdmConfig() if edm.is_folder(config):
            return edm.load_edm(config, device)
        case CheckpointConfig():
            return checkpoint.load_checkpoint(config, device)
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
        case EdmConfig() if edm.is_folder(config):
            return None
        case CheckpointConfig():
            opened = checkpoint.open_checkpoint(config)
            if not opened.convention.is_foreign:
                return checkpoint.load_network(opened, config.path, "cpu")
    return None


def readings(
    config: ConventionConfig, device: torch.device | str
) -> Iterator[tuple[str, conventions.Velocity]]:
    """The model of `config` as every other convention has it: as settings, and as velocity.

    None of one that is preconditioned, as EDM's are: its output says what it is.
    """
    if isinstance(config, DiffusersConfig):
        model, unit = diffusers.load_model(config, device), diffusers.STEPS
        own = diffusers.convention(config)
    elif isinstance(config, EdmConfig) and edm.is_folder(config):
        return
    else:
        assert isinstance(config, CheckpointConfig)
        opened = checkpoint.open_checkpoint(config)
        network, own = opened.layout.network, opened.convention
        if isinstance(network, Edm2UNetConfig):
            return
        if isinstance(network, EdmUNetConfig) and network.time == "edm":
            return
        model, unit = checkpoint.load_raw(config, device), 1.0
    for convention in conventions.every(unit):
        if convention.words == own.words:
            continue
        yield convention.words, conventions.Converted(model, convention)


def build_field(teacher: base.FrozenTeacher, config: TeacherConfig) -> base.Guided:
    """What the solver of `config` evaluates: the guided velocity, or a student's mean velocity.

    Raises:
        ConfigError: guidance of a teacher that has no classes.
    """
    if config.solver != "jumps":
        return base.guided(teacher, config.guidance, config.guided_channels)
    assert isinstance(teacher, base.NetworkTeacher)
    return base.Jumps(teacher)
