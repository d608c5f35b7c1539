"""The learned problems: scanned digits. A teacher is trained once and kept in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.objectives.problems import Problem, Solved
from benchmarks.objectives.student import averaged, fit
from distill.config import TrainConfig
from distill.datasets.config import DataConfig
from distill.datasets.images import ImageStream, InMemory, load_images
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


EVERY, ODD, EVEN = slice(None), slice(1, None, 2), slice(0, None, 2)  # images


def train_teacher(folder: Path, settings: TrainConfig, part: slice) -> None:
    """Trains the teacher by flow matching on a part of the real images, into a model folder."""
    images = InMemory(*(whole[part].numpy() for whole in load_images(DATA)))
    seed = 0 if part == EVERY else 1
    stream = ImageStream(images, seed, settings.batch_size, 0, 1, settings.label_dropout)
    network = build_network(NETWORK, DATA.image, seed)
    engine = fit(network, stream.read, ReflowConfig(), settings, seed)
    state = averaged(engine, build_network(NETWORK, DATA.image, seed)).state_dict()
    save_model(folder, state, NETWORK, DATA.image, {"kind": "teacher"})


def digits_problem(name: str, folder: Path, is_quick: bool) -> Problem:
    """The digits teacher in `folder`, trained now if it is not there; briefly if `is_quick`.

    "digits_other" has another teacher, of the odd images alone, and even ones as samples.
    """
    trained, measured = (ODD, EVEN) if name == "digits_other" else (EVERY, EVERY)
    if not (folder / DESCRIPTION).exists():
        settings = replace(PRETRAIN, max_steps=300) if is_quick else PRETRAIN
        train_teacher(folder, settings, trained)
    field = guided(load_native(NativeConfig(path=str(folder)), "cpu"), GUIDANCE)

    def network(seed: int) -> AbstractNetwork:  # a student starts as its teacher, for every seed
        return load_model(folder, "cpu")[0].train().requires_grad_(True)

    return Problem(
        name=name,
        image=DATA.image,
        teachers=(Solved(field, "heun", 16),),
        truth=Solved(field, "heun", 32),
        data=load_images(DATA)[0][measured],
        make_network=network,
        num_pairs=4096,
        num_truth=1000,
        steps=560,
        batch_size=128,
        lr=8e-3,
    )
