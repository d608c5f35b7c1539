"""A training that takes no time, for tests of what is around it."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from distill.config import ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.objectives.build import build_objective
from distill.objectives.config import ReflowConfig
from distill.run.dir import RunDir
from distill.testing import StraightFlow, flow_batch
from distill.training.log import Work
from distill.training.loop import train


class TinyTraining(NamedTuple):
    """One small network, one batch of four, one process."""

    batch: TrajectoryBatch
    image: ImageSpec = ImageSpec(1, 4, 3)
    network: DiTConfig = DiTConfig(patch_size=2, width=8, depth=1, num_heads=1)
    work: Work = Work(flops_per_sample=1e3, peak_flops=1e6)

    def fit(self, root, steps, read=None, objective=None, stop=lambda: False, **settings):
        """Trains to step `steps`; the engine."""
        config = TrainConfig(batch_size=4, max_steps=steps, **settings)
        network = build_network(self.network, self.image, seed=3)
        engine = TorchEngine(network, config, torch.device("cpu"))
        train(
            engine,
            read or (lambda step: self.batch),
            objective or build_objective(ReflowConfig(), 0),
            config,
            RunDir(root),
            origin={"seed": 0},
            wait_s=lambda: 0.0,
            should_stop=stop,
            work=self.work,
        )
        return engine


@pytest.fixture(scope="session")
def tiny() -> TinyTraining:
    flow = StraightFlow(torch.full((1, 4, 4), 0.5), 0.3)
    double = flow_batch(flow, grid=2, count=4)
    floats = {name: getattr(double, name).float() for name in ("states", "times", "weights")}
    return TinyTraining(replace(double, **floats))
