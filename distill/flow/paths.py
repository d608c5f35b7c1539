"""The time convention, and the curves the objectives use.

**t = 0 is noise, t = 1 is data.** The straight path is x_t = (1 - t) x_0 + t x_1 with velocity
x_1 - x_0. A student's jump is G(x, t, s) = x + (s - t) u(x, t, s), so u(x, t, t) is the
instantaneous velocity and G(x, t, t) = x exactly. Jumps go forward, t <= s; that is not enforced
here. Models of another convention are converted by their adapter in `distill.teachers.build` and
nowhere else.
"""

from collections.abc import Callable
from math import comb
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.conditions.condition import Condition

# u(x, t, s, condition) -> mean velocity over [t, s].
#   x [B, C, H, W] or [B, D], t and s [B] in [0, 1], the Condition of each sample, of the kind that
#   the network takes; the result has the shape of x.
MeanVelocity = Callable[
    [Float[Tensor, "B *S"], Float[Tensor, "B"], Float[Tensor, "B"], Any], Float[Tensor, "B *S"]
]


def expand_as(t: Float[Tensor, "B"], x: Float[Tensor, "B *S"]) -> Float[Tensor, "B *ones"]:
    """`t` with trailing axes of size one, so that it broadcasts against `x`."""
    return t.reshape(-1, *([1] * (x.ndim - 1)))


def interpolate(
    x_0: Float[Tensor, "B *S"], x_1: Float[Tensor, "B *S"], t: Float[Tensor, "B"]
) -> Float[Tensor, "B *S"]:
    """x_t = (1 - t) x_0 + t x_1."""
    t = expand_as(t, x_0)
    return (1 - t) * x_0 + t * x_1


def jump(
    u: MeanVelocity,
    x: Float[Tensor, "B *S"],
    t: Float[Tensor, "B"],
    s: Float[Tensor, "B"],
    condition: Condition,
) -> Float[Tensor, "B *S"]:
    """G(x, t, s) = x + (s - t) u(x, t, s)."""
    return x + expand_as(s - t, x) * u(x, t, s, condition)


# -----------------------------------------------------------------------------------------------
# Bezier curves: B(t) = sum_k C(n,k) (1-t)^(n-k) t^k P_k


def bernstein(degree: int, t: Float[Tensor, "B"]) -> Float[Tensor, "B n1"]:
    """Bernstein polynomials C(n,k) (1-t)^(n-k) t^k for k = 0 .. n, one row per time."""
    k = torch.arange(degree + 1, device=t.device)
    binomial = torch.tensor(
        [comb(degree, i) for i in range(degree + 1)], dtype=t.dtype, device=t.device
    )
    return binomial * (1 - t[:, None]) ** (degree - k) * t[:, None] ** k


def bezier_point(points: Float[Tensor, "B n1 *S"], t: Float[Tensor, "B"]) -> Float[Tensor, "B *S"]:
    """B(t) for control points P_0 .. P_n along axis 1."""
    weights = bernstein(points.shape[1] - 1, t)
    return torch.einsum("bk,bk...->b...", weights, points)


def bezier_velocity(
    points: Float[Tensor, "B n1 *S"], t: Float[Tensor, "B"]
) -> Float[Tensor, "B *S"]:
    """dB/dt = n sum_k C(n-1,k) (1-t)^(n-1-k) t^k (P_{k+1} - P_k)."""
    degree = points.shape[1] - 1
    return degree * bezier_point(points[:, 1:] - points[:, :-1], t)


def bezier_fit(
    states: Float[Tensor, "B K1 *S"], times: Float[Tensor, "K1"], degree: int
) -> Float[Tensor, "B n1 *S"]:
    """Control points of the least-squares curve through `states`, both ends kept exactly.

    The interior points solve min sum_j |B(t_j) - X_j|^2. With degree - 1 interior times it
    interpolates; for the times 1/2 (n = 2) or 1/3, 2/3 (n = 3) it gives the closed forms of
    docs/method.md.

    Raises:
        ValueError: fewer than degree - 1 interior times.
    """
    if len(times) - 2 < degree - 1:
        raise ValueError(
            f"a curve of degree {degree} needs {degree - 1} interior states, not {len(times) - 2}"
        )
    first, last = states[:, :1], states[:, -1:]
    if degree == 1:
        return torch.cat([first, last], dim=1)
    basis = bernstein(degree, times[1:-1].double())
    ends = torch.stack([basis[:, 0], basis[:, -1]], dim=1).to(states.dtype)
    rest = states[:, 1:-1] - torch.einsum("jk,bk...->bj...", ends, torch.cat([first, last], dim=1))
    solve = torch.linalg.pinv(basis[:, 1:-1]).to(states.dtype)
    return torch.cat([first, torch.einsum("kj,bj...->bk...", solve, rest), last], dim=1)
