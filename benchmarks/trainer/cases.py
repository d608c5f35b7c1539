"""The networks of `benchmarks/trainer.py`, and an engine of ZeRO on one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.trainer.step import BATCH, IMAGE, NETWORK
from cluster.trainer.zero import DeepSpeedEngine
from distill.config import TrainConfig
from distill.networks.build import build_network
from distill.networks.config import DiTConfig


class Case(NamedTuple):
    """A network, the samples and the number of its steps, and the bar of its overhead, per cent."""

    network: DiTConfig
    batch: int
    steps: int
    bar: float


LARGER = DiTConfig(patch_size=2, width=384, depth=9, num_heads=6)  # 24,735,364 weights
CASES = {
    "digits": Case(NETWORK, BATCH, 60, 15),
    "25 M": Case(LARGER, BATCH, 10, 5),
    "25 M, few samples": Case(LARGER, 16, 20, 5),
}
WARM_UP = 3  # steps


def settings(case: Case, **more: Any) -> TrainConfig:
    """The defaults, but a constant learning rate."""
    return TrainConfig(batch_size=case.batch, decay="constant", warmup_steps=0, **more)


def new_engine(case: Case, config: TrainConfig) -> DeepSpeedEngine:
    """An engine of ZeRO on a network of its own."""
    return DeepSpeedEngine(build_network(case.network, IMAGE, 0), config, torch.device("cpu"))


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
