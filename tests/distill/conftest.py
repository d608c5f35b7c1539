"""A training that takes no time, for tests of what is around it."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from small_training import fit_all

from distill.config import ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.objectives.build import build_objective
from distill.objectives.config import ReflowConfig
from distill.testing import StraightFlow, flow_batch
from distill.training.log import Flops


class TinyTraining(NamedTuple):
    """One small network, one batch of four, one process."""

    batch: TrajectoryBatch
    image: ImageSpec = ImageSpec(1, 4, 3)
    network: DiTConfig = DiTConfig(patch_size=2, width=8, depth=1, num_heads=1)
    flops: Flops = Flops(per_sample=1e3, peak_per_s=1e6)

    def new_network(self):
        """The network before the first step."""
        return build_network(self.network, self.image, seed=3)

    def fit(
        self,
        root,
        steps,
        read=None,
        objective=None,
        stop=lambda: False,
        more=(),
        engine=None,
        **settings,
    ):
        """Trains to step `steps`, with `more` callbacks; the engine."""
        config = TrainConfig(batch_size=4, max_steps=steps, **settings)
        engine = engine or TorchEngine(self.new_network(), config, torch.device("cpu"))
        fit_all(
            engine,
            read or (lambda step: self.batch),
            objective or build_objective(ReflowConfig(), 0),
            config,
            root,
            {"seed": 0},
            more,
            should_stop=stop,
            flops=self.flops,
        )
        return engine


@pytest.fixture(scope="session")
def tiny() -> TinyTraining:
    flow = StraightFlow(torch.full((1, 4, 4), 0.5), 0.3)
    double = flow_batch(flow, grid=2, count=4)
    floats = {name: getattr(double, name).float() for name in ("states", "times", "weights")}
    return TinyTraining(replace(double, **floats))
