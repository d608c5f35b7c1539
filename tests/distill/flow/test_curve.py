"""The teacher's curve: exact on cubics, of fourth order, through its states, on any grid."""

import itertools

import numpy as np
import pytest
import torch

from distill.flow.curve import curve_through, own_error, slopes
from distill.testing import GaussianFlow

EVEN = torch.linspace(0, 1, 9, dtype=torch.float64)
SHIFTED = EVEN * 3 / (1 + 2 * EVEN)  # as samplers of flow models shift their times
GAPS = torch.tensor([0, 0.1, 0.25, 0.3, 0.7, 1.0], dtype=torch.float64)
GRIDS = {"even": EVEN, "shifted": SHIFTED, "gaps": GAPS}

FLOW = GaussianFlow(torch.tensor([1.0, -0.5]).double(), 0.3)
X_0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

each_grid = pytest.mark.parametrize("times", GRIDS.values(), ids=list(GRIDS))
each_source = pytest.mark.parametrize("is_given", [True, False], ids=["velocities", "states"])


def some_times(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def polynomial(degree: int, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and slope at t of a few polynomials, [*t, 2, 3]."""
    shape, generator = (degree + 1, 2, 3), torch.Generator().manual_seed(degree)
    factors = torch.randn(shape, generator=generator, dtype=torch.float64)
    value, slope = torch.zeros(*t.shape, 2, 3).double(), torch.zeros(*t.shape, 2, 3).double()
    for n, factor in enumerate(factors):
        value = value + t[..., None, None] ** n * factor
        slope = slope + n * t[..., None, None] ** max(n - 1, 0) * factor
    return value, slope


def of_flow(times: torch.Tensor, is_given: bool) -> tuple:
    """States, times and velocities of a closed-form teacher."""
    states = torch.stack([FLOW.map(X_0, 0.0, float(t)) for t in times], dim=1)
    given = [FLOW.velocity(x, float(t)) for x, t in zip(states.unbind(1), times, strict=True)]
    return states, times, torch.stack(given, dim=1) if is_given else None


@each_source
@each_grid
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_it_is_exact_on_cubics_at_every_time(degree, times, is_given):
    states, velocities = (part.expand(7, -1, -1, -1) for part in polynomial(degree, times))
    curve = curve_through(states, times, velocities if is_given else None)
    t = some_times(7)
    for found, expected in zip(curve.at(t), polynomial(degree, t), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_source
@each_grid
def test_it_is_the_stored_state_at_a_stored_time_bit_for_bit(times, is_given):
    times = times.float()
    states, _, velocities = of_flow(times, is_given)
    states = states.float()
    curve = curve_through(states, times, None if velocities is None else velocities.float())
    for k, t in enumerate(times):
        x, dx = curve.at(t.expand(len(states)))
        assert torch.equal(x, states[:, k])
        torch.testing.assert_close(dx, curve.velocities[:, k], rtol=1e-5, atol=1e-5)


@each_source
def test_value_and_slope_have_no_break_where_pieces_meet(is_given):
    curve = curve_through(*of_flow(GAPS, is_given))
    for t in GAPS[1:-1]:
        before, after = (curve.at((t + d).expand(64)) for d in (-1e-9, 1e-9))
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_slope_is_the_derivative_of_the_value():
    curve, t = curve_through(*of_flow(SHIFTED, False)), some_times(64)
    _, derivative = torch.func.jvp(lambda t: curve.at(t)[0], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(curve.at(t)[1], derivative, rtol=1e-10, atol=1e-10)


def missed(times: torch.Tensor, is_given: bool) -> torch.Tensor:
    """X(t) less the true state at three times inside each piece, [pieces, 3, 64, 2]."""
    curve, found = curve_through(*of_flow(times, is_given)), []
    for start, end in itertools.pairwise(times):
        inside = [start + (end - start) * r for r in (0.25, 0.5, 0.75)]
        gaps = [curve.at(t.expand(64))[0] - FLOW.map(X_0, 0.0, float(t)) for t in inside]
        found.append(torch.stack(gaps))
    return torch.stack(found)


@each_source
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_error_is_of_fourth_order_everywhere_and_at_both_ends(is_given, shift):
    sizes, found = [24, 32, 48, 64, 96], []
    for size in sizes:
        times = torch.linspace(0, 1, size + 1, dtype=torch.float64)
        gaps = missed(shift * times / (1 + (shift - 1) * times), is_given)
        off = gaps.abs().amax(dim=(1, 2, 3))
        found.append([float(off.max()), float(off[0]), float(off[-1])])
    for column in np.log(found).T:
        order, _ = np.polyfit(-np.log(sizes), column, 1)
        assert order > 3.8


@each_grid
def test_slopes_are_exact_for_polynomials_of_degree_four(times):
    states, expected = polynomial(4, times)
    found = torch.einsum("kj,j...->k...", slopes(times), states)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_few_states_tell_what_they_can(last):
    """Two make a straight line, three a parabola."""
    times = torch.linspace(0, 1, last + 1, dtype=torch.float64)
    states, expected = polynomial(last, times)
    torch.testing.assert_close(torch.einsum("kj,j...->k...", slopes(times), states), expected)


@each_source
@pytest.mark.parametrize("grid", [4, 8])
def test_its_own_error_is_of_the_size_of_the_true_one(grid, is_given):
    """It tells a grid that is too coarse from one that is not: a halving is a factor of 256."""
    times = torch.linspace(0, 1, grid + 1, dtype=torch.float64)
    states, _, velocities = of_flow(times, is_given)
    way = (states[:, -1] - states[:, 0]).square().mean()
    true = float(missed(times, is_given).square().mean() / way)
    assert 0.1 < own_error(states, times, velocities) / true < 100


def test_two_ends_alone_tell_no_error():
    assert own_error(X_0[:, None].expand(-1, 2, -1), torch.tensor([0.0, 1.0]).double()) == 0
