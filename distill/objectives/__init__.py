"""Distillation objectives, one file each. `build_objective` lists them all."""

from distill.config import (
    BezierConfig,
    ConsistencyConfig,
    EndpointConfig,
    MeanFlowConfig,
    ObjectiveConfig,
    ReflowConfig,
    TraFlowConfig,
)
from distill.objectives.base import Objective
from distill.objectives.bezier import Bezier
from distill.objectives.consistency import Consistency
from distill.objectives.endpoint import Endpoint
from distill.objectives.meanflow import MeanFlow
from distill.objectives.reflow import Reflow
from distill.objectives.traflow import TraFlow


def build_objective(config: ObjectiveConfig, seed: int) -> Objective:
    """The objective of a configuration; `seed` is that of its random times."""
    match config:
        case TraFlowConfig():
            return TraFlow(config, seed)
        case BezierConfig():
            return Bezier(config, seed)
        case EndpointConfig():
            return Endpoint(config, seed)
        case ReflowConfig():
            return Reflow(config, seed)
        case ConsistencyConfig():
            return Consistency(config, seed)
        case MeanFlowConfig():
            return MeanFlow(config, seed)
    raise TypeError(f"no objective for {type(config).__name__}")
