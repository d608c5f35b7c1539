"""Derivatives of the student: both forms of the velocity term, and the Eulerian target."""

import math

import pytest
import torch
from torch import Tensor, nn

from distill.config import ImageSpec
from distill.flow.paths import jump
from distill.objectives import derivatives
from distill.objectives.base import Call, pick
from distill.objectives.build import build_objective
from distill.objectives.config import (
    GuidesConfig,
    LagrangianConfig,
    MeanFlowConfig,
    ShortcutConfig,
    SummedConfig,
)
from distill.objectives.derivatives import eulerian_target, time_derivative
from distill.objectives.distances import l2
from distill.objectives.summed import finite_change_term, jvp_term, last_change, state_derivative
from distill.testing import NETWORKS, GaussianFlow, StraightFlow, flow_batch, random_network

IMAGE = ImageSpec(1, 4, 3)
MEAN = torch.full(IMAGE.shape, 0.5, dtype=torch.float64)
FLOW, STRAIGHT = GaussianFlow(MEAN, 0.3), StraightFlow(MEAN, 0.3)
FORMS = ("jvp", "finite_difference")
VELOCITY_ALONE = {
    "weight_output": 0.0,
    "weight_states": 0.0,
    "weight_velocity": 1.0,
    "distance": "l2",
}

both_networks = pytest.mark.parametrize("name", NETWORKS)


def velocity_config(derivative: str, mode: str = "trajectory") -> SummedConfig:
    return SummedConfig(**VELOCITY_ALONE, derivative=derivative, velocity_mode=mode)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t < s and labels of a few samples."""
    t = torch.linspace(0, 0.8, n, dtype=torch.float64)
    return draw(n, *IMAGE.shape), t, t + 0.15, torch.arange(n) % 3


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    """The gradient by all weights in one row; 0 for a weight that takes no part."""
    weights = list(network.parameters())
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(w) if g is None else g).flatten()
            for w, g in zip(weights, grads, strict=True)
        ]
    )


def full_loss(network: nn.Module, call: Call, slope: Tensor, label: Tensor) -> Tensor:
    """|u + (s - t) du/ds - slope|^2 / d with du/ds by a central difference, and gradient through it
    too. Backward over torch's forward mode would lose a part of that in layer norm (pytorch issue
    175754).
    """
    h = 1e-5
    times = (call.s, call.s + h, call.s - h)
    u, ahead, behind = (network(call.x, call.t, s, label) for s in times)
    du_ds = (ahead - behind) / (2 * h)
    return l2(u + (call.s - call.t)[:, None, None, None] * du_ds, slope).mean()


def order(errors: list[float]) -> float:
    """The exponent p of error ~ h^p, from the last halving of h."""
    return math.log2(errors[-2] / errors[-1])


# -----------------------------------------------------------------------------------------------
# The derivative in s


@both_networks
def test_the_slope_of_a_jump_at_its_start_is_the_velocity(name):
    network, (x, t, _, label) = random_network(name, IMAGE), point()
    _, slope = torch.func.jvp(lambda s: jump(network, x, t, s, label), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, network(x, t, t, label), rtol=1e-12, atol=1e-12)


@both_networks
def test_forward_mode_and_a_central_difference_are_one_derivative(name):
    network, (x, t, s, label) = random_network(name, IMAGE), point()
    h = 1e-5
    central = (network(x, t, s + h, label) - network(x, t, s - h, label)) / (2 * h)
    forward = time_derivative(network, x, t, s, label)
    assert central.norm() > 1 and not forward.requires_grad
    torch.testing.assert_close(forward, central, rtol=1e-6, atol=1e-6)


def test_the_exact_derivative_of_the_states_has_an_error_of_second_order():
    """At every time of the grid, the two ends included."""
    errors = []
    for grid in (16, 32, 64, 128):
        batch = flow_batch(FLOW, grid=grid)
        places = torch.arange(0, grid + 1, grid // 16)
        found = torch.stack(
            [state_derivative(batch, torch.full((16,), int(b))) for b in places], dim=1
        )
        exact = torch.stack(
            [FLOW.velocity(batch.best[:, b], float(batch.times[b])) for b in places], dim=1
        )
        errors.append(float((found - exact).abs().max()))
    assert order(errors) == pytest.approx(2, abs=0.1)


def test_on_an_even_grid_it_is_the_central_difference():
    batch, b = flow_batch(FLOW), torch.arange(16) % 7 + 1
    central = (pick(batch.best, b + 1) - pick(batch.best, b - 1)) / (2 / 8)
    torch.testing.assert_close(state_derivative(batch, b), central)


def test_with_the_two_ends_alone_the_change_is_all_there_is():
    batch, b = flow_batch(FLOW, grid=1), torch.arange(16) % 2
    assert torch.equal(state_derivative(batch, b), last_change(batch, torch.ones_like(b)))


# -----------------------------------------------------------------------------------------------
# The two forms


@pytest.mark.parametrize("mode", ["trajectory", "straight"])
@both_networks
def test_the_finite_form_differs_by_the_first_order_of_the_grid(name, mode):
    """Halving the interval of the stored grid halves the gap of the losses."""
    network, gaps = random_network(name, IMAGE), []
    for grid in (256, 512):
        batch = flow_batch(FLOW, grid=grid)
        exact, finite = (
            float(
                build_objective(velocity_config(form, mode), 0)
                .loss(batch, network, network, 3)
                .total.detach()
            )
            for form in FORMS
        )
        gaps.append(abs(finite - exact) / exact)
    assert gaps[-1] < 0.05
    assert order(gaps) == pytest.approx(1, abs=0.2)


@both_networks
def test_at_fixed_times_the_finite_form_converges_with_order_one(name):
    network, (x, t, s, label) = random_network(name, IMAGE), point()
    slope = draw(*x.shape, seed=1)
    exact = full_loss(network, Call(x, t, s), slope, label)
    expected = gradient(exact, network)
    gaps, gradient_gaps = [], []
    for h in (2e-3, 1e-3, 5e-4):
        term = finite_change_term(Call(x, t, s), s - h, slope, l2, 1.0)
        results = [network(call.x, call.t, call.s, label) for call in term.calls]
        loss = term.value(*results).mean()
        gaps.append(abs(float((loss - exact).detach())))
        gradient_gaps.append(float((gradient(loss, network) - expected).norm()))
    assert order(gaps) == pytest.approx(1, abs=0.05)
    assert order(gradient_gaps) == pytest.approx(1, abs=0.05)


@both_networks
def test_forward_mode_holds_its_derivative_fixed(name):
    """Its gradient is that of D(u, c) with c = slope - (s - t) du/ds a constant."""
    network, (x, t, s, label) = random_network(name, IMAGE), point()
    slope = draw(*x.shape, seed=1)
    term = jvp_term(Call(x, t, s), slope, network, label, l2, 1.0)
    found = gradient(term.value(network(x, t, s, label)).mean(), network)
    c = slope - (s - t)[:, None, None, None] * time_derivative(network, x, t, s, label)
    expected = gradient(l2(network(x, t, s, label), c).mean(), network)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    other = gradient(full_loss(network, Call(x, t, s), slope, label), network)
    assert float((other - found).norm() / other.norm()) > 0.1  # the full gradient is another one


# -----------------------------------------------------------------------------------------------
# Exact maps


def test_the_exact_flow_map_has_no_finite_velocity_loss():
    # The change of G over a grid interval is the change of the stored states.
    objective = build_objective(velocity_config("finite_difference"), 0)
    batch = flow_batch(FLOW)
    assert float(objective.loss(batch, FLOW.student, FLOW.student, 3).total) < 1e-24


def test_the_exact_flow_map_has_a_velocity_gap_of_second_order():
    """The only error is that of the states' derivative: the root of the squared loss is O(h^2)."""
    gaps = []
    for grid in (32, 64, 128):
        batch = flow_batch(FLOW, grid=grid, count=64)
        objective = build_objective(velocity_config("jvp"), 0)
        result = objective.loss(batch, FLOW.student, FLOW.student, 3)
        gaps.append(float(result.total.sqrt()))
    assert gaps[-1] < 1e-2
    assert order(gaps) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["trajectory", "straight"])
def test_on_straight_paths_the_exact_map_has_no_velocity_loss(mode, form):
    objective = build_objective(velocity_config(form, mode), 0)
    result = objective.loss(flow_batch(STRAIGHT), STRAIGHT.student, STRAIGHT.student, 3)
    assert float(result.total) < 1e-24


@pytest.mark.parametrize("form", FORMS)
def test_on_curved_paths_straight_velocity_and_the_flow_map_disagree(form):
    objective = build_objective(velocity_config(form, "straight"), 0)
    result = objective.loss(flow_batch(FLOW), FLOW.student, FLOW.student, 3)
    assert float(result.total) > 1e-3


# -----------------------------------------------------------------------------------------------
# The Eulerian target


@both_networks
def test_the_finite_step_of_the_eulerian_target_is_of_first_order(name, monkeypatch):
    network, (x, t, s, label) = random_network(name, IMAGE), point()
    v, call = draw(*x.shape, seed=1), Call(x, t, s)
    here = network(x, t, s, label)
    exact = eulerian_target(network, here, call, v, label, "jvp")
    errors = []
    for h in (2e-3, 1e-3, 5e-4):
        monkeypatch.setattr(derivatives, "FINITE_STEP", h)
        found = eulerian_target(network, here, call, v, label, "finite_difference")
        errors.append(float((found - exact).norm()))
    assert order(errors) == pytest.approx(1, abs=0.05)


def test_the_finite_step_never_leaves_the_unit_interval():
    def student(x, t, s, label):
        assert bool(((t >= 0) & (t <= s) & (s <= 1)).all()) or bool((t <= 0.01).any())
        assert bool(((t >= 0) & (t <= 1) & (s >= 0) & (s <= 1)).all())
        return x

    tiny = 2.0**-24
    ends = torch.tensor([0, tiny, 0.004, 0.005, 0.5, 0.996, 1 - tiny, 1], dtype=torch.float64)
    pairs = torch.cartesian_prod(ends, ends)
    t, s = pairs[pairs[:, 0] <= pairs[:, 1]].T
    x, label = draw(len(t), *IMAGE.shape), torch.zeros(len(t), dtype=torch.int64)
    eulerian_target(student, x, Call(x, t, s), x, label, "finite_difference")


@pytest.mark.parametrize(
    "config",
    [
        MeanFlowConfig(),
        MeanFlowConfig(times="after"),
        LagrangianConfig(),
        ShortcutConfig(),
        GuidesConfig(variant="path"),
        GuidesConfig(variant="straight"),
    ],
    ids=str,
)
def test_no_objective_asks_the_student_outside_the_unit_interval(config):
    def student(x, t, s, label):
        assert bool(((t >= 0) & (t <= 1) & (s >= 0) & (s <= 1)).all())
        return x

    objective, batch = build_objective(config, 0), flow_batch(FLOW, count=512)
    for step in range(8):
        objective.loss(batch, student, student, step)


def test_the_eulerian_target_takes_no_gradient():
    network, (x, t, s, label) = random_network("dit", IMAGE), point()
    here = network(x, t, s, label)
    for form in ("jvp", "finite_difference"):
        goal = eulerian_target(
            network, here, Call(x, t, s), x.clone().requires_grad_(), label, form
        )
        assert not goal.requires_grad
