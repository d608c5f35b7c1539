"""The learned problem: scanned digits. The teacher is trained once and kept in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.objectives.problems import Problem, Solved
from benchmarks.objectives.student import averaged, fit
from distill.config import TrainConfig
from distill.data.config import DataConfig
from distill.data.images import ImageStream, load_images
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.networks.files import DESCRIPTION, load_model, save_model
from distill.networks.layers import AbstractNetwork
from distill.objectives.config import ReflowConfig
from distill.teachers.base import guided
from distill.teachers.config import NativeConfig
from distill.teachers.native import load_native

DATA = DataConfig(name="digits", channels=1, size=8, num_classes=10)
NETWORK = DiTConfig(patch_size=2, width=64, depth=3, num_heads=4, mlp_ratio=2.0)
GUIDANCE = 1.5
PRETRAIN = TrainConfig(max_steps=1500, batch_size=256, lr=2e-3, warmup_steps=50)


def train_teacher(folder: Path, settings: TrainConfig) -> None:
    """Trains the teacher by flow matching on the real images, into a model folder."""
    images, labels = load_images(DATA)
    stream = ImageStream(images, labels, 0, settings.batch_size, 0, 1, settings.label_dropout)
    network = build_network(NETWORK, DATA.image, 0)
    engine = fit(network, stream.read, ReflowConfig(), settings, 0)
    state = averaged(engine, build_network(NETWORK, DATA.image, 0)).state_dict()
    save_model(folder, state, NETWORK, DATA.image, {"kind": "teacher"})


def digits_problem(folder: Path, is_quick: bool) -> Problem:
    """The digits teacher in `folder`, trained now if it is not there; briefly if `is_quick`."""
    if not (folder / DESCRIPTION).exists():
        train_teacher(folder, replace(PRETRAIN, max_steps=300) if is_quick else PRETRAIN)
    field = guided(load_native(NativeConfig(path=str(folder)), "cpu"), GUIDANCE)

    def network(seed: int) -> AbstractNetwork:  # a student starts as its teacher, for every seed
        return load_model(folder, "cpu")[0].train().requires_grad_(True)

    return Problem(
        name="digits",
        image=DATA.image,
        teachers=(Solved(field, "heun", 16),),
        truth=Solved(field, "heun", 32),
        data=load_images(DATA)[0],
        make_network=network,
        num_pairs=4096,
        num_truth=1000,
        steps=560,
        batch_size=128,
        lr=8e-3,
    )
