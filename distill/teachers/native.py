"""A teacher of our own: a model folder. Its velocity is the diagonal u(x, t, t) of the network.

A student is a teacher too. After `reflow` its field is the next rectified flow, for any solver.
After the other objectives it is a map G, to be used in jumps that it was trained on.
"""

from pathlib import Path

import torch

from distill.config import check
from distill.flow.times import DRILLED
from distill.networks.files import WEIGHTS, fingerprint, load_model, open_model
from distill.teachers.base import NetworkTeacher, TeacherDescription
from distill.teachers.config import NativeConfig
from distill.teachers.precision import prepared


def describe_native(config: NativeConfig) -> TeacherDescription:
    """What a model folder holds.

    Raises:
        ConfigError: the folder holds no whole model, or a student is to be guided.
    """
    folder = Path(config.path)
    network, meta = open_model(folder)
    is_student = meta.get("kind") == "student"
    check(
        not is_student or network.image.num_classes == 0 or config.guidance == 1,
        f"teacher.guidance={config.guidance} with the student {folder} as teacher: a student has "
        'learned the guided field and knows no label "none"; set teacher.NAME.guidance=1',
    )
    return TeacherDescription(
        network.image, fingerprint(folder / WEIGHTS), is_student, network=network.config
    )


def load_native(config: NativeConfig, device: torch.device | str) -> NetworkTeacher:
    """The teacher of a model folder. Raises as `describe_native`."""
    description = describe_native(config)
    network, meta = load_model(Path(config.path), device)
    return NetworkTeacher(prepared(network, config), description, meta.get("middle", DRILLED))
