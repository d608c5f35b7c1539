"""Exponential moving averages of the float32 master weights, in the pieces the optimizer keeps."""

from collections.abc import Sequence

import torch


def decay_at(step: int, decay: float) -> float:
    """Decay of update number `step` (from 0): min(decay, (1 + step) / (10 + step)).

    The ramp forgets the random start of a short run; it is the one of common EMA libraries.
    """
    return min(decay, (1 + step) / (10 + step))


class Average:
    """Moving average m <- d m + (1 - d) w over a list of float32 tensors.

    Attributes:
        decay: d, reached after the ramp of `decay_at`.
        values: the averages, one per master tensor.
    """

    def __init__(self, decay: float, masters: Sequence[torch.Tensor]) -> None:
        self.decay = decay
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, step: int, masters: Sequence[torch.Tensor]) -> None:
        """Takes in the masters after optimizer step `step` (from 0)."""
        weight = 1 - decay_at(step, self.decay)
        torch._foreach_lerp_(self.values, [master.detach() for master in masters], weight)
