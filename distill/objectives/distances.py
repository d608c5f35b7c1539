"""Distances D of the objectives, one number per sample: between images, and between velocities.

`distill.objectives.lpips` has the third one, by the features of a network.
"""

import torch
from jaxtyping import Float

from distill.objectives.base import Distances
from distill.objectives.config import ObjectiveConfig


def squared_gap(
    a: Float[torch.Tensor, "B *S"], b: Float[torch.Tensor, "B *S"]
) -> Float[torch.Tensor, "B"]:
    """|a - b|^2, in float32 or better."""
    gap = a - b
    dtype = torch.promote_types(gap.dtype, torch.float32)
    return gap.to(dtype).flatten(1).square().sum(dim=1)


def l2(a: Float[torch.Tensor, "B *S"], b: Float[torch.Tensor, "B *S"]) -> Float[torch.Tensor, "B"]:
    """|a - b|^2 / d for the d values of a sample."""
    return squared_gap(a, b) / a[0].numel()


def pseudo_huber(
    a: Float[torch.Tensor, "B *S"], b: Float[torch.Tensor, "B *S"]
) -> Float[torch.Tensor, "B"]:
    """sqrt(|a - b|^2 + c^2) - c, c = 0.00054 d (Lee et al., 2024, "Improving the Training of
    Rectified Flows"). It grows like |a - b|, so outliers weigh less.
    """
    c = 0.00054 * a[0].numel()
    return (squared_gap(a, b) + c * c).sqrt() - c


def rms_huber(
    a: Float[torch.Tensor, "B *S"], b: Float[torch.Tensor, "B *S"]
) -> Float[torch.Tensor, "B"]:
    """`pseudo_huber` over the root of d: it grows like the root mean square of a - b, so it has the
    scale of LPIPS, which is about that of a difference of pixels whatever their number is.
    """
    return pseudo_huber(a, b) / a[0].numel() ** 0.5


def build_distances(config: ObjectiveConfig, device: torch.device) -> Distances:
    """The distances of `objective.distance`. LPIPS looks at images, so velocities then take
    pseudo-Huber in its scale.

    Raises:
        ConfigError: the backbone of LPIPS cannot be read.
    """
    match config.distance:
        case "l2":
            return Distances(l2, l2)
        case "lpips":
            # It imports torchvision, which takes as long as torch itself, at every start of a rank.
            from distill.objectives.lpips import load_lpips

            return Distances(load_lpips(config.lpips_backbone, device), rms_huber)
        case _:
            return Distances(pseudo_huber, pseudo_huber)
