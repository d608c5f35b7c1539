"""The teacher's curve: a trajectory at every time between its stored states.

Between the states X_k and X_{k+1} at t_k and t_{k+1} = t_k + h it is the cubic Bezier curve of

    P_0 = X_k,   P_1 = X_k + h v_k / 3,   P_2 = X_{k+1} - h v_{k+1} / 3,   P_3 = X_{k+1}

    X(t) = B(r),   dX/dt = B'(r) / h,   r = (t - t_k) / h

with the teacher's velocities v_k, which the solver has for nothing, or those that the states tell.
The pieces meet in value and slope, so X(t) is smooth. Its error is of order h^4, and no teacher is
called for it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.flow.paths import bezier_point, bezier_velocity, expand_as

STENCIL = 5  # states that tell a velocity: an error of order h^4


@dataclass(frozen=True)
class Curve:
    """A trajectory of each sample as a composite cubic Bezier curve.

    Attributes:
        states: X_0 .. X_K.
        velocities: dX/dt at the same times.
        times: t_0 < .. < t_K, evenly spaced or not.
    """

    states: Float[Tensor, "B K1 *S"]
    velocities: Float[Tensor, "B K1 *S"]
    times: Float[Tensor, "K1"]

    def at(self, t: Float[Tensor, "B"]) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"]]:
        """X(t) and dX/dt for one time per sample. At a stored time X(t) is the stored state."""
        piece = torch.searchsorted(self.times, t.contiguous(), right=True) - 1
        piece = piece.clamp(0, len(self.times) - 2)
        h = self.times[piece + 1] - self.times[piece]
        r, points = (t - self.times[piece]) / h, self.control_points(piece)
        return bezier_point(points, r), bezier_velocity(points, r) / expand_as(h, points[:, 0])

    def control_points(self, piece: Int[Tensor, "B"]) -> Float[Tensor, "B 4 *S"]:
        """P_0 .. P_3 of one piece of each sample."""
        rows = torch.arange(len(piece), device=piece.device)
        first, last = self.states[rows, piece], self.states[rows, piece + 1]
        third = expand_as(self.times[piece + 1] - self.times[piece], first) / 3
        leaves, arrives = self.velocities[rows, piece], self.velocities[rows, piece + 1]
        return torch.stack([first, first + third * leaves, last - third * arrives, last], dim=1)


def curve_through(
    states: Float[Tensor, "B K1 *S"],
    times: Float[Tensor, "K1"],
    velocities: Float[Tensor, "B K1 *S"] | None = None,
) -> Curve:
    """The curve through `states`, with the velocities given, or as the states tell them."""
    if velocities is None:
        velocities = torch.einsum("kj,bj...->bk...", slopes(times), states)
    return Curve(states, velocities, times)


def slopes(times: Float[Tensor, "K1"]) -> Float[Tensor, "K1 K1"]:
    """D with dX/dt at t_k = sum_j D[k, j] X_j: the slope of the polynomial through the `STENCIL`
    states around t_k, which are on one side of it at the ends.

    Exact for polynomials of degree 4, or of K where there are fewer states.
    """
    size = min(STENCIL, len(times))
    exact, power = times.double(), torch.arange(size, device=times.device)
    table = torch.zeros(len(times), len(times), dtype=torch.float64, device=times.device)
    for k, t in enumerate(exact):
        first = min(max(k - size // 2, 0), len(times) - size)
        near = exact[first : first + size] - t
        scale = near.abs().max()
        # weights w with sum_j w_j near_j^n = n 0^(n-1), for n = 0 .. size - 1
        moments = (near / scale) ** power[:, None]
        table[k, first : first + size] = torch.linalg.solve(moments, (power == 1) / scale)
    return table.to(times.dtype)


def own_error(
    states: Float[Tensor, "B K1 *S"],
    times: Float[Tensor, "K1"],
    velocities: Float[Tensor, "B K1 *S"] | None = None,
) -> float:
    """What the curve is off by between its states, as a mean square relative to |X_K - X_0|^2; a
    cautious estimate, and 0 where only the two ends are stored.

    It is what the curve through every other state misses of those left out, over 16: half the grid
    missed 16 to 84 times as much on digits and on the ring, and 256 times in the limit.
    """
    last = len(times) - 1
    kept = sorted({*range(0, last, 2), last})
    left = [k for k in range(last) if k not in kept]
    if not left:
        return 0.0
    given = None if velocities is None else velocities[:, kept]
    coarse = curve_through(states[:, kept], times[kept], given)
    gaps = [coarse.at(times[k].expand(len(states)))[0] - states[:, k] for k in left]
    missed = torch.stack(gaps).square().sum() / len(left)
    return float(missed / (states[:, -1] - states[:, 0]).square().sum()) / 16
