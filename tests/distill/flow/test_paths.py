"""Curves: exact ends, exact derivatives, degree elevation, fits through given states."""

import pytest
import torch

from distill.flow.paths import bezier_fit, bezier_point, bezier_velocity, interpolate, jump


def points(degree: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(degree)
    return torch.randn(5, degree + 1, 2, 3, generator=generator, dtype=torch.float64)


def uniform_times(n: int = 5) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_a_curve_starts_and_ends_at_its_end_points_exactly(degree):
    control = points(degree)
    assert torch.equal(bezier_point(control, torch.zeros(5).double()), control[:, 0])
    assert torch.equal(bezier_point(control, torch.ones(5).double()), control[:, -1])


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_the_velocity_is_the_derivative_of_the_point(degree):
    control, t = points(degree), uniform_times()
    _, derivative = torch.func.jvp(lambda t: bezier_point(control, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(bezier_velocity(control, t), derivative, rtol=1e-12, atol=1e-12)


def test_degree_elevation_changes_neither_point_nor_velocity():
    control, t = points(2), uniform_times()
    p0, p1, p2 = control.unbind(dim=1)
    elevated = torch.stack([p0, (p0 + 2 * p1) / 3, (2 * p1 + p2) / 3, p2], dim=1)
    for function in (bezier_point, bezier_velocity):
        torch.testing.assert_close(function(control, t), function(elevated, t))


def test_the_quadratic_fit_is_the_closed_form():
    states = points(2)
    x_0, x_half, x_1 = states.unbind(dim=1)
    times = torch.tensor([0, 0.5, 1]).double()
    expected = torch.stack([x_0, 2 * x_half - (x_0 + x_1) / 2, x_1], dim=1)
    torch.testing.assert_close(bezier_fit(states, times, 2), expected)


def test_the_cubic_fit_is_the_closed_form():
    states = points(3)
    x_0, x_a, x_b, x_1 = states.unbind(dim=1)
    times = torch.arange(4).double() / 3
    p_1 = (-5 * x_0 + 18 * x_a - 9 * x_b + 2 * x_1) / 6
    p_2 = (2 * x_0 - 9 * x_a + 18 * x_b - 5 * x_1) / 6
    expected = torch.stack([x_0, p_1, p_2, x_1], dim=1)
    torch.testing.assert_close(bezier_fit(states, times, 3), expected)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_a_fit_finds_a_curve_of_its_own_degree(degree):
    control, times = points(degree), torch.linspace(0, 1, 9).double()
    states = torch.stack([bezier_point(control, t.expand(5)) for t in times], dim=1)
    torch.testing.assert_close(bezier_fit(states, times, degree), control, rtol=1e-9, atol=1e-9)


def test_a_fit_needs_enough_states():
    with pytest.raises(ValueError, match="degree 3 needs 2 interior states, not 1"):
        bezier_fit(points(2), torch.tensor([0, 0.5, 1]).double(), 3)


def test_a_jump_of_length_zero_is_the_identity_whatever_the_network_says():
    x, t = points(1)[:, 0], uniform_times()
    label = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(jump(lambda x, t, s, y: 1e30 * torch.ones_like(x), x, t, t, label), x)


def test_the_straight_path_is_the_curve_of_degree_one():
    control, t = points(1), uniform_times()
    straight = interpolate(control[:, 0], control[:, 1], t)
    torch.testing.assert_close(bezier_point(control, t), straight)
