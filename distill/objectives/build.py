"""Distillation objectives, one file each. `build_objective` lists them all."""

import torch

from distill.objectives.base import GradientNorms, Objective
from distill.objectives.bezier import Bezier
from distill.objectives.config import (
    BezierConfig,
    ConsistencyConfig,
    EndpointConfig,
    GuidesConfig,
    MeanFlowConfig,
    ObjectiveConfig,
    ReflowConfig,
    SummedConfig,
    TraFlowConfig,
)
from distill.objectives.consistency import Consistency
from distill.objectives.distances import build_distances
from distill.objectives.endpoint import Endpoint
from distill.objectives.guides import Guides
from distill.objectives.meanflow import MeanFlow
from distill.objectives.reflow import Reflow
from distill.objectives.summed import Summed
from distill.objectives.traflow import TraFlow


def build_objective(
    config: ObjectiveConfig,
    seed: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    gradient_norms: GradientNorms | None = None,
) -> Objective:
    """The objective of a configuration; `seed` is that of its random times.

    `device` is where batches will be. `gradient_norms`, an engine's, is for adaptive weights.

    Raises:
        ConfigError: the weights of a distance cannot be read.
    """
    distances = build_distances(config, device)
    match config:
        case TraFlowConfig():
            return TraFlow(config, distances, seed)
        case BezierConfig():
            return Bezier(config, distances, seed)
        case SummedConfig():
            return Summed(config, distances, seed, gradient_norms)
        case GuidesConfig():
            return Guides(config, distances, seed)
        case EndpointConfig():
            return Endpoint(config, distances)
        case ReflowConfig():
            return Reflow(config, distances, seed)
        case ConsistencyConfig():
            return Consistency(config, distances, seed)
        case MeanFlowConfig():
            return MeanFlow(config, distances, seed)
    raise TypeError(f"no objective for {type(config).__name__}")
