"""The learned problem: scanned digits, a teacher trained on them once and kept."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.problems import Problem
from distill.config import DataConfig, DiTConfig, ReflowConfig, TrainConfig
from distill.datasets import load_images
from distill.engine import EVALUATION, TorchEngine, average_kind
from distill.models import load_model, save_model
from distill.networks import build_network
from distill.objectives import build_objective
from distill.pretrain import ImageStream
from distill.teachers.native import NativeTeacher
from distill.teachers.base import guided
from distill.train import learning_rate

DATA = DataConfig(name="digits", channels=1, size=8, num_classes=10)
NETWORK = DiTConfig(patch_size=2, width=64, depth=3, num_heads=4, mlp_ratio=2.0)
GUIDANCE = 1.5
PRETRAIN = TrainConfig(max_steps=1500, batch_size=256, lr=2e-3, warmup_steps=50)


def train_teacher(folder: Path) -> None:
    """Trains the teacher by flow matching on the real images, into a model folder."""
    images, labels = load_images(DATA)
    stream = ImageStream(images, labels, 0, PRETRAIN.batch_size, 0, 1, PRETRAIN.label_dropout)
    network = build_network(NETWORK, DATA.image, 0)
    engine = TorchEngine(network, PRETRAIN, torch.device("cpu"))
    objective = build_objective(ReflowConfig(), 0)
    for step in range(PRETRAIN.max_steps):
        batch = stream.read(step)
        engine.backward(objective.loss(batch, engine.student, engine.target, step).total, True)
        engine.step(step, learning_rate(step, PRETRAIN))
    save_model(folder, evaluation_weights(engine), NETWORK, DATA.image, {"kind": "teacher"})


def evaluation_weights(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """The average that is evaluated, by parameter name."""
    kind = average_kind(EVALUATION)
    shapes = engine.describe()["parameters"]
    return {f.name: f.data.view(shapes[f.name]) for f in engine.fragments() if f.kind == kind}


def digits_problem(folder: Path) -> Problem:
    """The digits teacher in `folder`, trained now if it is not there."""
    if not (folder / "model.json").exists():
        train_teacher(folder)
    teacher = NativeTeacher(folder, "cpu")

    def network(seed: int) -> nn.Module:  # a student starts as its teacher
        return load_model(folder, "cpu")[0].requires_grad_(True).train()

    return Problem(
        name="digits",
        image=DATA.image,
        fields=[guided(teacher, GUIDANCE)],
        solvers=[("heun", 16)],
        data=load_images(DATA)[0],
        make_network=network,
        truth_solver="heun",
        truth_steps=32,
        num_truth=2000,
    )
