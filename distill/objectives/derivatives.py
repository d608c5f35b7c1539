"""Derivatives of the student along a path: by forward mode, by difference, by double backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distill.flow.paths import MeanVelocity, expand_as
from distill.objectives.base import Call

# Step of the finite difference of u along a path. Float32 rounding grows as 1/h, the error as h.
FINITE_STEP = 5e-3


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
