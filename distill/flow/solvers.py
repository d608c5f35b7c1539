"""ODE solvers on a given time grid. dx/dt = v(x, t), from noise at t = 0 to data at t = 1.

With h the step from t to t + h and k_1 = v(x, t):

    euler   x + h k_1                                                                       order 1
    heun    x + h/2 (k_1 + k_2),            k_2 = v(x + h k_1, t + h)                        order 2
    rk4     x + h/6 (k_1 + 2 k_2 + 2 k_3 + k_4),  k_2, k_3 at t + h/2, k_4 at t + h          order 4

One evaluation of v is one NFE, however many network forwards guidance makes of it.

A student has no need of them: it jumps, x <- G(x, t, t + h) = x + h u(x, t, t + h).
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from distill.conditions.condition import Condition
from distill.config import check_choice, check_positive
from distill.flow.paths import MeanVelocity, jump

ODE_SOLVERS = ("euler", "heun", "rk4")

# v(x [B, *S], t scalar tensor) -> dx/dt [B, *S]
Velocity = Callable[[Float[Tensor, "B *S"], Float[Tensor, ""]], Float[Tensor, "B *S"]]


def solve(
    velocity: Velocity,
    x: Float[Tensor, "B *S"],
    times: Float[Tensor, "K1"],
    solver: str,
    substeps: int = 1,
    velocities: list[Tensor] | None = None,
) -> Float[Tensor, "K1 B *S"]:
    """States at `times`, from `x` at the first, by `substeps` equal steps in each interval.

    `velocities`, an empty list, gets dx/dt at all of `times`. The solver has them for nothing, but
    for the last one, which takes one more evaluation.

    The steps are computed in float64 and rounded to the dtype of `x`, so the grid is the same for
    every dtype.

    Raises:
        ConfigError: unknown solver, or no substeps.
    """
    check_choice("solver", solver, ODE_SOLVERS)
    check_positive("solver", substeps=substeps)

    def v(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.tensor(t, dtype=x.dtype, device=x.device))

    states = [x]
    for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        h = (end - start) / substeps
        for index in range(substeps):
            t = start + index * h
            k_1 = v(x, t)
            if velocities is not None and index == 0:
                velocities.append(k_1)
            x = _step(v, x, k_1, t, h, solver)
        states.append(x)
    if velocities is not None:
        velocities.append(v(x, times[-1].item()))
    return torch.stack(states)


def _step(
    v: Callable[[Tensor, float], Tensor], x: Tensor, k_1: Tensor, t: float, h: float, solver: str
) -> Tensor:
    """The state at t + h; k_1 is the velocity at t."""
    if solver == "euler":
        return x + h * k_1
    if solver == "heun":
        return x + h / 2 * (k_1 + v(x + h * k_1, t + h))
    k_2 = v(x + h / 2 * k_1, t + h / 2)
    k_3 = v(x + h / 2 * k_2, t + h / 2)
    k_4 = v(x + h * k_3, t + h)
    return x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


def solve_by_jumps(
    u: MeanVelocity, x: Float[Tensor, "B *S"], times: Float[Tensor, "K1"], condition: Condition
) -> Float[Tensor, "K1 B *S"]:
    """States at `times`, from `x` at the first, by one jump from each to the next."""
    states = [x]
    for t, s in itertools.pairwise(times.to(x)):
        states.append(jump(u, states[-1], t.expand(len(x)), s.expand(len(x)), condition))
    return torch.stack(states)
