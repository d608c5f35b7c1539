"""What the objectives share: protocol, terms, distances, random draws, derivatives.

An objective is a few terms. A term says which evaluations of the student it needs, and what its
value is once they are made. So the evaluations of all terms go through the network as one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distill.flow.noise import uniform
from distill.flow.paths import MeanVelocity, expand_as
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives.config import ObjectiveConfig

# Step of the finite difference of u along a path. Float32 rounding grows as 1/h, the error as h.
FINITE_STEP = 5e-3

# [len(losses)] norms of the gradient of each loss, averaged over ranks, for the last layer's weight
GradientNorms = Callable[[list[Tensor]], Float[Tensor, "N"]]
# D(a, b) per sample
Distance = Callable[[Float[Tensor, "B *S"], Float[Tensor, "B *S"]], Float[Tensor, "B"]]


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


@dataclass(frozen=True)
class Call:
    """An evaluation u(x, t, s) of the student, with gradient to its weights."""

    x: Float[Tensor, "B *S"]
    t: Float[Tensor, "B"]
    s: Float[Tensor, "B"]

    def landing(self, u: Float[Tensor, "B *S"]) -> Float[Tensor, "B *S"]:
        """G(x, t, s) = x + (s - t) u, for `u` the result of this call."""
        return self.x + expand_as(self.s - self.t, self.x) * u


@dataclass(frozen=True)
class Term:
    """A part of a loss.

    Attributes:
        weight: what it counts.
        calls: evaluations of the student.
        value: value per sample, from the results of `calls`, in their order.
    """

    weight: float
    calls: list[Call]
    value: Callable[..., Float[Tensor, "B"]]


def loss_terms(terms: dict[str, Term], student: MeanVelocity, label: Int[Tensor, "B"]) -> LossTerms:
    """Means over the batch of all terms, from one evaluation of the student.

    A call that several terms share is made once.
    """
    calls = list({id(call): call for term in terms.values() for call in term.calls}.values())
    results: dict[int, Tensor] = {}
    if calls:
        x = torch.cat([call.x for call in calls])
        t, s = torch.cat([call.t for call in calls]), torch.cat([call.s for call in calls])
        parts = student(x, t, s, label.repeat(len(calls))).chunk(len(calls))
        results = {id(call): part for call, part in zip(calls, parts, strict=True)}
    values = {n: term.value(*[results[id(c)] for c in term.calls]) for n, term in terms.items()}
    return LossTerms(
        {name: term.weight for name, term in terms.items()},
        {name: value.mean() for name, value in values.items()},
    )


# -----------------------------------------------------------------------------------------------
# Distances


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


@dataclass(frozen=True)
class Distances:
    """D of an objective: between states of a path, which are images, and between velocities."""

    states: Distance
    velocities: Distance


def build_distances(config: ObjectiveConfig, device: torch.device) -> Distances:
    """The distances of `objective.distance`. LPIPS looks at images, so velocities then take
    pseudo-Huber.

    Raises:
        ConfigError: the backbone of LPIPS cannot be read.
    """
    match config.distance:
        case "l2":
            return Distances(l2, l2)
        case "lpips":
            # With torchvision, as long to import as torch itself, at every start of a rank.
            from distill.objectives.lpips import load_lpips

            return Distances(load_lpips(config.lpips_backbone, device), pseudo_huber)
        case _:
            return Distances(pseudo_huber, pseudo_huber)


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
# Derivatives of the student


def time_derivative(
    u: MeanVelocity,
    x: Float[Tensor, "B *S"],
    t: Float[Tensor, "B"],
    s: Float[Tensor, "B"],
    label: Int[Tensor, "B"],
) -> Float[Tensor, "B *S"]:
    """sg[ du(x, t, s)/ds ] by forward mode, tangent 1 on s."""
    with torch.no_grad():
        return torch.func.jvp(lambda s_: u(x, t, s_, label), (s,), (torch.ones_like(s),))[1]


class PlainLayerNorm(TorchFunctionMode):
    """Writes layer_norm out: (x - mean) / sqrt(variance + eps) weight + bias.

    torch's own takes mean and variance for constants in third derivatives, without a word
    (pytorch issue 175754). The gradient of du/ds by double backward is one.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # everything torch does passes here, attributes too
        function = self._layer_norm if func is F.layer_norm else func
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _layer_norm(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        axes = tuple(range(-len(normalized_shape), 0))
        variance, mean = torch.var_mean(input, axes, correction=0, keepdim=True)
        result = (input - mean) * (variance + eps).rsqrt()
        result = result if weight is None else result * weight
        return result if bias is None else result + bias


def with_time_derivative(
    u: MeanVelocity,
    x: Float[Tensor, "B *S"],
    t: Float[Tensor, "B"],
    s: Float[Tensor, "B"],
    label: Int[Tensor, "B"],
) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"]]:
    """u(x, t, s) and du/ds by double backward; gradient reaches the weights through both.

    For any w, g(w) = d(w . u)/ds is linear in w; so du/ds = dg/dw for the gradient of sum g.
    """
    s = s.clone().requires_grad_()
    # The fused kernels of attention cannot be differentiated twice, those of layer_norm not thrice.
    with sdpa_kernel(SDPBackend.MATH), PlainLayerNorm():
        value = u(x, t, s, label)
    w = torch.zeros_like(value, requires_grad=True)
    (g,) = torch.autograd.grad(value, s, w, create_graph=True)
    (du_ds,) = torch.autograd.grad(g.sum(), w, create_graph=True)
    return value, du_ds


def eulerian_target(
    u: MeanVelocity,
    here: Float[Tensor, "B *S"],
    call: Call,
    v: Float[Tensor, "B *S"],
    label: Int[Tensor, "B"],
    derivative: str,
) -> Float[Tensor, "B *S"]:
    """sg[ v + (s - t) d/dt u(x_t, t, s) ], the target of here = u(x, t, s), without gradient.

    Along a path with dx/dt = v, (s - t) u = int_t^s v, so u = v + (s - t) du/dt with the total
    derivative du/dt = J_x u v + d_t u (MeanFlow, Geng et al. 2025, eq. 6, with time reversed).
    `derivative` is "jvp" (forward mode, exact) or "finite_difference" (one more plain forward).
    """
    x, t, s = call.x, call.t, call.s
    with torch.no_grad():
        if derivative == "jvp":
            du_dt = torch.func.jvp(
                lambda x_, t_: u(x_, t_, s, label), (x, t), (v, torch.ones_like(t))
            )[1]
        else:
            # Ahead where the step stays within [t, s], else back, and never outside [0, 1].
            stays = (t + FINITE_STEP <= s) | (t < FINITE_STEP)
            h = torch.where(stays, FINITE_STEP, -FINITE_STEP).to(t)
            moved = u(x + expand_as(h, x) * v, t + h, s, label)
            du_dt = (moved - here.detach()) / expand_as(h, x)
        return v + expand_as(s - t, x) * du_dt
