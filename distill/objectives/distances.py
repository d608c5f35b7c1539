"""Distances D of the objectives, one number per sample: between images, and between velocities.

`distill.objectives.lpips` has the third one, by the features of a network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill.flow.paths import expand_as
from distill.objectives.base import Call
from distill.objectives.config import ObjectiveConfig

# D(a, b) per sample
Distance = Callable[[Float[Tensor, "B *S"], Float[Tensor, "B *S"]], Float[Tensor, "B"]]


def squared_gap(a: Float[Tensor, "B *S"], b: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """|a - b|^2, in float32 or better."""
    gap = a - b
    dtype = torch.promote_types(gap.dtype, torch.float32)
    return gap.to(dtype).flatten(1).square().sum(dim=1)


def l2(a: Float[Tensor, "B *S"], b: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """|a - b|^2 / d for the d values of a sample."""
    return squared_gap(a, b) / a[0].numel()


def pseudo_huber(a: Float[Tensor, "B *S"], b: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """sqrt(|a - b|^2 + c^2) - c, c = 0.00054 d (Lee et al., 2024, "Improving the Training of
    Rectified Flows"). It grows like |a - b|, so outliers weigh less.
    """
    c = 0.00054 * a[0].numel()
    return (squared_gap(a, b) + c * c).sqrt() - c


def rms_huber(a: Float[Tensor, "B *S"], b: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """`pseudo_huber` over the root of d: it grows like the root mean square of a - b, so it has the
    scale of LPIPS, which is about that of a difference of pixels whatever their number is.
    """
    return pseudo_huber(a, b) / a[0].numel() ** 0.5


@dataclass(frozen=True)
class Distances:
    """D of an objective: between states of a path, which are images, and between velocities.

    Both are in one scale, so that their terms can be weighed.
    """

    states: Distance
    velocities: Distance

    def jumps(
        self, call: Call, u: Float[Tensor, "B *S"], change: Float[Tensor, "B *S"], power: float
    ) -> Float[Tensor, "B"]:
        """D( (s - t)^p u, (s - t)^p change ) of jumps from t to s, for u the result of `call`.

        Where D looks at images, jumps to t = 1 are compared by where they land, with the same
        power of their length: D( x + (s - t) u, x + (s - t) change ) (s - t)^(p - 1).
        """
        gap = call.s - call.t
        scale = expand_as(gap**power, u)
        off = self.velocities(scale * u, scale * change)
        if self.states is self.velocities:
            return off
        rows = ((call.s == 1) & (gap > 0)).nonzero()[:, 0]
        if len(rows) == 0:
            return off
        landed, goal = call.landing(u)[rows], call.landing(change)[rows]
        images = self.states(landed, goal) * gap[rows] ** (power - 1)
        return off.index_copy(0, rows, images.to(off))


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
