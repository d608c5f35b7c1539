"""What the objectives share: protocol, result, distances, random draws, picks from the grid."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.noise import uniform
from distill.paths import MeanVelocity, expand_as
from distill.trajectory import TrajectoryBatch

# Step of the finite difference of u along a path. Float32 rounding grows as 1/h, the error as h.
FINITE_STEP = 5e-3


@dataclass
class LossTerms:
    """The result of an objective.

    Attributes:
        weights: what each term counts, by name; a number, or a scalar without gradient.
        terms: every term that was computed, a scalar mean over the batch, with gradient.
    """

    weights: dict[str, float | Float[Tensor, ""]]
    terms: dict[str, Float[Tensor, ""]]

    @property
    def total(self) -> Float[Tensor, ""]:
        """sum_k weights[k] terms[k]: the loss."""
        return torch.stack([self.weights[name] * term for name, term in self.terms.items()]).sum()


@runtime_checkable
class Objective(Protocol):
    """A distillation loss on teacher trajectories."""

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        """The loss on this rank's part of a global batch, a mean over its samples.

        `student` carries gradient to its weights; `target`, its moving average, to its input only.
        """


def weighted_sum(terms: dict[str, tuple[float, Float[Tensor, "B"]]]) -> LossTerms:
    """Means over the batch of the terms, given as (weight, value per sample)."""
    return LossTerms(
        {name: weight for name, (weight, _) in terms.items()},
        {name: value.mean() for name, (_, value) in terms.items()},
    )


# -----------------------------------------------------------------------------------------------
# Distances


def distance(
    kind: str, prediction: Float[Tensor, "B *S"], target: Float[Tensor, "B *S"]
) -> Float[Tensor, "B"]:
    """D(a, b) per sample, over the d values of a sample.

    l2:           |a - b|^2 / d
    pseudo_huber: sqrt(|a - b|^2 + c^2) - c, c = 0.00054 d (Lee et al., 2024, "Improving the
                  Training of Rectified Flows"); it grows like |a - b|, so outliers weigh less.
    """
    gap = prediction - target
    dtype = torch.promote_types(gap.dtype, torch.float32)
    square = gap.to(dtype).flatten(1).square().sum(dim=1)
    dim = prediction[0].numel()
    if kind == "l2":
        return square / dim
    c = 0.00054 * dim
    return (square + c * c).sqrt() - c


# -----------------------------------------------------------------------------------------------
# Random draws, by position in the global batch


def draw(seed: int, purpose: str, step: int, batch: TrajectoryBatch) -> Float[Tensor, "B"]:
    """Uniform numbers in [0, 1), one per sample, in the dtype of the batch's times.

    A pure function of (seed, purpose, step, position in the global batch): the same on any number
    of ranks and for any split into micro-batches.
    """
    whole = torch.from_numpy(uniform(seed, f"objective/{purpose}", step, batch.global_size))
    # Rounding to float32 can reach 1.0, which is outside the range.
    whole = whole.to(batch.times).clamp(max=1 - 2**-24)
    return whole[batch.positions]


def draw_index(
    u: Float[Tensor, "B"], low: int | Int[Tensor, "B"], high: int | Int[Tensor, "B"]
) -> Int[Tensor, "B"]:
    """Whole numbers low .. high, both included, from uniform `u`."""
    span = torch.as_tensor(high - low + 1, device=u.device)
    return low + (u * span).long().minimum(span - 1)


def pick(states: Float[Tensor, "B K1 *S"], index: Int[Tensor, "B"]) -> Float[Tensor, "B *S"]:
    """states[i, index[i]] for every sample i."""
    return states[torch.arange(len(states), device=states.device), index]


# -----------------------------------------------------------------------------------------------
# The Eulerian flow-map identity, shared by MeanFlow and the Bezier map


def eulerian_target(
    u: MeanVelocity,
    x: Float[Tensor, "B *S"],
    v: Float[Tensor, "B *S"],
    t: Float[Tensor, "B"],
    s: Float[Tensor, "B"],
    label: Int[Tensor, "B"],
    derivative: str,
) -> Float[Tensor, "B *S"]:
    """sg[ v + (s - t) d/dt u(x_t, t, s) ], the target of u(x, t, s), without gradient.

    Along a path with dx/dt = v, (s - t) u = int_t^s v, so u = v + (s - t) du/dt with the total
    derivative du/dt = J_x u v + d_t u (MeanFlow, Geng et al. 2025, eq. 6, with time reversed).
    `derivative` is "jvp" (forward mode, exact) or "finite_difference" (two plain forwards).
    """
    with torch.no_grad():
        if derivative == "jvp":
            du_dt = torch.func.jvp(
                lambda x_, t_: u(x_, t_, s, label), (x, t), (v, torch.ones_like(t))
            )[1]
        else:
            ahead = u(x + FINITE_STEP * v, t + FINITE_STEP, s, label)
            du_dt = (ahead - u(x, t, s, label)) / FINITE_STEP
        return v + expand_as(s - t, x) * du_dt
