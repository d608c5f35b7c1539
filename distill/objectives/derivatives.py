"""Derivatives of the student along a path, without gradient: exact, by forward mode, or over a
small step, which is one more forward and needs float32 (`check_eulerian` of the settings).
"""

import torch
from jaxtyping import Float

from distill.conditions.condition import Condition
from distill.flow.paths import MeanVelocity, expand_as
from distill.objectives.base import Call

# Step of the finite difference of u along a path. Float32 rounding grows as 1/h, the error as h.
FINITE_STEP = 5e-3


def time_derivative(
    u: MeanVelocity,
    x: Float[torch.Tensor, "B *S"],
    t: Float[torch.Tensor, "B"],
    s: Float[torch.Tensor, "B"],
    condition: Condition,
) -> Float[torch.Tensor, "B *S"]:
    """sg[ du(x, t, s)/ds ] by forward mode, tangent 1 on s."""
    with torch.no_grad():
        return torch.func.jvp(lambda s_: u(x, t, s_, condition), (s,), (torch.ones_like(s),))[1]


def eulerian_target(
    u: MeanVelocity,
    here: Float[torch.Tensor, "B *S"],
    call: Call,
    v: Float[torch.Tensor, "B *S"],
    condition: Condition,
    derivative: str,
) -> Float[torch.Tensor, "B *S"]:
    """sg[ v + (s - t) d/dt u(x_t, t, s) ], the target of here = u(x, t, s), without gradient.

    Along a path with dx/dt = v, (s - t) u = int_t^s v, so u = v + (s - t) du/dt with the total
    derivative du/dt = J_x u v + d_t u (MeanFlow, Geng et al. 2025, eq. 6, with time reversed).
    `derivative` is "jvp" (forward mode, exact) or "finite_difference" (one more plain forward).
    """
    x, t, s = call.x, call.t, call.s
    with torch.no_grad():
        if derivative == "jvp":
            du_dt = torch.func.jvp(
                lambda x_, t_: u(x_, t_, s, condition), (x, t), (v, torch.ones_like(t))
            )[1]
        else:
            # Ahead where the step stays within [t, s], else back, and never outside [0, 1].
            stays = (t + FINITE_STEP <= s) | (t < FINITE_STEP)
            h = torch.where(stays, FINITE_STEP, -FINITE_STEP).to(t)
            moved = u(x + expand_as(h, x) * v, t + h, s, condition)
            du_dt = (moved - here.detach()) / expand_as(h, x)
        return v + expand_as(s - t, x) * du_dt
