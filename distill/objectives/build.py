"""Distillation objectives, one file each. `build_objective` lists them all."""

import torch

from distill.objectives import (
    base,
    bezier,
    config,
    consistency,
    endpoint,
    guides,
    lagrangian,
    meanflow,
    progressive,
    reflow,
    shortcut,
    summed,
    traflow,
)
from distill.objectives.distances import build_distances


def build_objective(
    settings: config.ObjectiveConfig,
    seed: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    gradient_norms: base.GradientNorms | None = None,
    max_steps: int = 1,
) -> base.Objective:
    """The objective of `settings`; `seed` is that of its random times.

    `device` is where batches will be. `gradient_norms`, an engine's, is for adaptive weights;
    `max_steps`, of the training, for a loss that changes over it.

    Raises:
        ConfigError: the weights of a distance cannot be read.
    """
    distances = build_distances(settings, device)
    match settings:
        case config.TraFlowConfig():
            return traflow.TraFlow(settings, distances, seed)
        case config.BezierConfig():
            return bezier.Bezier(settings, distances, seed)
        case config.SummedConfig():
            return summed.Summed(settings, distances, seed, gradient_norms)
        case config.GuidesConfig():
            return guides.Guides(settings, distances, seed)
        case config.EndpointConfig():
            return endpoint.Endpoint(settings, distances)
        case config.ReflowConfig():
            return reflow.Reflow(settings, distances, seed)
        case config.ConsistencyConfig():
            return consistency.Consistency(settings, distances, seed)
        case config.MeanFlowConfig():
            return meanflow.MeanFlow(settings, distances, seed)
        case config.LagrangianConfig():
            return lagrangian.Lagrangian(settings, distances, seed)
        case config.ShortcutConfig():
            return shortcut.Shortcut(settings, distances, seed)
        case config.ProgressiveConfig():
            return progressive.Progressive(settings, distances, seed, max_steps)
    raise TypeError(f"no objective for {type(settings).__name__}")
