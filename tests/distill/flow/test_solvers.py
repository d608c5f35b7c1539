"""Solvers: the order of convergence, measured, and what they count."""

import numpy as np
import pytest
import torch

from distill.config import ConfigError
from distill.flow.solvers import ODE_SOLVERS, solve, solve_by_jumps
from distill.flow.times import NFE_PER_STEP
from distill.sample import few_step
from distill.testing import GaussianFlow


def flow():
    return GaussianFlow(mean=torch.tensor([1.0, -0.5]).double(), std=0.3)


def start():
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    flow_, x = flow(), start()
    exact = flow_.map(x, 0.0, 0.7)
    steps = np.array([40, 56, 80, 112, 160])
    errors = []
    for n in steps:
        times = torch.linspace(0, 0.7, int(n) + 1, dtype=torch.float64)
        errors.append(float((solve(flow_.velocity, x, times, solver)[-1] - exact).norm()))
    slope, _ = np.polyfit(np.log(1 / steps), np.log(errors), 1)
    assert abs(slope - order) < 0.03


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_substeps_refine_the_grid(solver):
    flow_, x = flow(), start()
    coarse = torch.linspace(0, 1, 3, dtype=torch.float64)
    fine = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(
        solve(flow_.velocity, x, coarse, solver, substeps=4),
        solve(flow_.velocity, x, fine, solver)[::4],
        rtol=1e-12,
        atol=1e-12,
    )


def test_states_stand_at_their_times_on_an_uneven_grid():
    flow_, x = flow(), start()
    times = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    states = solve(flow_.velocity, x, times, "rk4", substeps=32)
    assert torch.equal(states[0], x)
    for t, state in zip(times.tolist(), states, strict=True):
        torch.testing.assert_close(state, flow_.map(x, 0.0, t), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_evaluations_are_counted_right(solver):
    calls = []

    def velocity(x, t):
        calls.append(float(t))
        return -x

    solve(velocity, start(), torch.linspace(0, 1, 4), solver, substeps=2)
    assert len(calls) == 6 * NFE_PER_STEP[solver]
    assert min(calls) == 0
    assert max(calls) <= 1 + 1e-12


def test_jumps_of_an_exact_map_are_exact_on_every_grid():
    flow_, x, label = flow(), start(), torch.zeros(5, dtype=torch.int64)
    times = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    states = solve_by_jumps(flow_.student, x, times, label)
    for t, state in zip(times.tolist(), states, strict=True):
        torch.testing.assert_close(state, flow_.map(x, 0.0, t), rtol=1e-12, atol=1e-12)


def test_jumps_on_an_even_grid_are_those_of_the_sampler():
    """For any student, an inexact one too; each jump is one evaluation."""
    seen, label = [], torch.zeros(5, dtype=torch.int64)

    def u(x, t, s, label):
        seen.append((float(t[0]), float(s[0])))
        return torch.sin(3 * x) + t[:, None] - s[:, None] ** 2

    states = solve_by_jumps(u, start(), torch.linspace(0, 1, 9, dtype=torch.float64), label)
    assert seen == [(n / 8, (n + 1) / 8) for n in range(8)]
    assert len(seen) == 8 * NFE_PER_STEP["jumps"]
    torch.testing.assert_close(states[-1], few_step(u, start(), label, 8), rtol=1e-12, atol=1e-12)


def test_jumps_are_no_solver_of_a_velocity():
    with pytest.raises(ConfigError, match="solver=jumps is not known; choose one of: euler"):
        solve(lambda x, t: x, start(), torch.tensor([0.0, 1.0]), "jumps")


def test_unknown_solver_is_a_sentence():
    with pytest.raises(ConfigError, match="solver=leapfrog is not known; choose one of: euler"):
        solve(lambda x, t: x, start(), torch.tensor([0.0, 1.0]), "leapfrog")
