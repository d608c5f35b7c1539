"""Bezier: curves and guides, degree elevation, several teachers, exact maps, kept distributions."""

import itertools

import pytest
import torch
from torch import Tensor

from distill.config import ImageSpec
from distill.flow.paths import bezier_point, bezier_velocity, expand_as, interpolate
from distill.flow.solvers import solve
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives.base import draw, loss_terms
from distill.objectives.build import build_objective
from distill.objectives.config import GuidesConfig
from distill.objectives.distances import l2
from distill.objectives.guides import control_points
from distill.objectives.reflow import flow_matching_term
from distill.testing import (
    NETWORKS,
    GaussianFlow,
    StraightFlow,
    batch_of,
    flow_batch,
    random_network,
)

IMAGE = ImageSpec(1, 4, 3)
ONES = torch.ones(IMAGE.shape, dtype=torch.float64)
FLOW, WEAK = GaussianFlow(0.5 * ONES, 0.3), GaussianFlow(0 * ONES, 1.5)
STRAIGHT = StraightFlow(0.5 * ONES, 0.3)
EVERY_LOSS = {"distance": "l2", "weight_drift": 1.0, "derivative": "jvp"}

both_networks = pytest.mark.parametrize("name", NETWORKS)


def losses(batch: TrajectoryBatch, student, **settings) -> dict[str, float]:
    objective = build_objective(GuidesConfig(**{**EVERY_LOSS, **settings}), 0)
    result = objective.loss(batch, student, student, 1)
    return {name: float(value.detach()) for name, value in result.terms.items()}


def times(n: int = 16) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Parabola:
    """x_t = x_0 + t a + t^2 b: a curved flow whose paths are Bezier curves of degree 2.

    Its velocity is a + 2 t b and its map u(x, t, s) = a + (t + s) b, wherever x is.
    """

    a, b = 0.7 * ONES, -1.3 * ONES

    def batch(self) -> TrajectoryBatch:
        x_0 = flow_batch(FLOW).noise
        states = [x_0 + t * self.a + t**2 * self.b for t in (0, 0.25, 0.5, 0.75, 1.0)]
        return batch_of(torch.stack(states, dim=1)[:, None])

    def student(self, x, t, s, label):
        return self.a + expand_as(t + s, x) * self.b


# -----------------------------------------------------------------------------------------------
# Curves and guides


@pytest.mark.parametrize(
    ("variant", "degree"), [("path", 2), ("path", 3), ("path", 5), ("endpoint", 2), ("straight", 1)]
)
def test_a_curve_goes_from_the_noise_to_the_best_output_exactly(variant, degree):
    flows = (WEAK, FLOW) if variant == "endpoint" else (FLOW,)
    batch = flow_batch(*flows)
    points = control_points(batch, variant, degree)
    assert points.shape[1] == degree + 1
    zero = torch.zeros(16, dtype=torch.float64)
    assert torch.equal(bezier_point(points, zero), batch.noise)
    assert torch.equal(bezier_point(points, zero + 1), batch.best[:, -1])


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_a_path_curve_hits_the_states_it_is_fitted_through(degree):
    batch = flow_batch(FLOW, grid=degree)
    points = control_points(batch, "path", degree)
    for k, t in enumerate(batch.times):
        found = bezier_point(points, t.expand(16))
        torch.testing.assert_close(found, batch.best[:, k], rtol=1e-12, atol=1e-12)


def test_path_guides_are_the_closed_forms():
    x_0, x_half, x_1 = flow_batch(FLOW, grid=2).best.unbind(dim=1)
    found = control_points(flow_batch(FLOW, grid=2), "path", 2)
    torch.testing.assert_close(found[:, 1], 2 * x_half - (x_0 + x_1) / 2)
    x_0, x_a, x_b, x_1 = flow_batch(FLOW, grid=3).best.unbind(dim=1)
    found = control_points(flow_batch(FLOW, grid=3), "path", 3)
    torch.testing.assert_close(found[:, 1], (-5 * x_0 + 18 * x_a - 9 * x_b + 2 * x_1) / 6)
    torch.testing.assert_close(found[:, 2], (2 * x_0 - 9 * x_a + 18 * x_b - 5 * x_1) / 6)


def test_endpoint_guides_are_the_outputs_weakest_first():
    batch = flow_batch(WEAK, FLOW)
    points = control_points(batch, "endpoint", 2)
    assert torch.equal(points[:, 0], batch.noise)
    assert torch.equal(points[:, 1], batch.states[:, 0, -1])
    assert torch.equal(points[:, 2], batch.states[:, 1, -1])
    assert torch.equal(points, control_points(batch, "endpoint", 1))  # n is their number


def test_the_same_teacher_twice_as_guide_is_a_warped_straight_line():
    """P_1 = P_2 = x_1: B(t) = x at tau = 1 - (1-t)^2 of the line, at the speed 2 (1-t)."""
    batch, t = flow_batch(FLOW, FLOW), times()
    points = control_points(batch, "endpoint", 2)
    x_0, x_1 = batch.noise, batch.best[:, -1]
    warped = interpolate(x_0, x_1, 1 - (1 - t) ** 2)
    torch.testing.assert_close(bezier_point(points, t), warped)
    speed = expand_as(2 * (1 - t), x_0)
    torch.testing.assert_close(bezier_velocity(points, t), speed * (x_1 - x_0))


# -----------------------------------------------------------------------------------------------
# Degree and teachers


@both_networks
def test_a_straight_line_as_a_curve_of_any_degree_has_the_same_losses(name):
    batch, student = flow_batch(STRAIGHT), random_network(name, IMAGE)
    expected = losses(batch, student, variant="straight")
    assert set(expected) == {"drift", "map", "end"}
    for degree in (1, 2, 3):
        found = losses(batch, student, variant="path", degree=degree)
        assert found == pytest.approx(expected, rel=1e-9)


def test_degree_elevation_of_a_parabola_changes_no_loss():
    batch, student = Parabola().batch(), random_network("dit", IMAGE)
    two, three = (losses(batch, student, variant="path", degree=n) for n in (2, 3))
    assert three == pytest.approx(two, rel=1e-9)


@both_networks
def test_identical_teachers_equal_one_whatever_their_weights(name):
    student = random_network(name, IMAGE)
    expected = losses(flow_batch(FLOW), student, variant="path", degree=3)
    for weights in ([1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]):
        batch = flow_batch(FLOW, FLOW, FLOW, weights=weights)
        found = losses(batch, student, variant="path", degree=3)
        assert found == pytest.approx(expected, rel=1e-9)


def test_several_teachers_mix_convexly_at_every_control_point():
    batch = flow_batch(WEAK, FLOW, weights=[0.25, 0.75])
    weak, best = (control_points(flow_batch(flow), "path", 3) for flow in (WEAK, FLOW))
    mixed = control_points(batch, "path", 3)
    torch.testing.assert_close(mixed, 0.25 * weak + 0.75 * best)
    torch.testing.assert_close(mixed[:, 0], batch.noise)


@both_networks
def test_the_straight_drift_is_reflow(name):
    batch, student = flow_batch(FLOW), random_network(name, IMAGE)
    settings = {"weight_drift": 1.0, "weight_map": 0.0, "weight_end": 0.0, "distance": "l2"}
    bezier = build_objective(GuidesConfig(variant="straight", **settings), 0)
    ours = bezier.loss(batch, student, student, 2).total
    t = draw(0, "bezier/t", 2, batch)  # the two objectives name their draws differently
    reflow = flow_matching_term(batch, t, l2, 1.0)
    expected = loss_terms({"flow_matching": reflow}, student, batch.condition).total
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# -----------------------------------------------------------------------------------------------
# Exact maps


@pytest.mark.parametrize("derivative", ["jvp", "finite_difference"])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_on_straight_paths_the_exact_map_has_no_loss(degree, derivative):
    settings = {"variant": "path", "degree": degree, "derivative": derivative}
    found = losses(flow_batch(STRAIGHT), STRAIGHT.student, **settings)
    assert max(found.values()) < 1e-20


@pytest.mark.parametrize("derivative", ["jvp", "finite_difference"])
@pytest.mark.parametrize("degree", [2, 3])
def test_on_curves_of_its_degree_the_exact_map_has_no_loss(degree, derivative):
    settings = {"variant": "path", "degree": degree, "derivative": derivative}
    flow = Parabola()
    assert max(losses(flow.batch(), flow.student, **settings).values()) < 1e-20
    straight = losses(flow.batch(), flow.student, variant="straight")
    assert min(straight["drift"], straight["map"]) > 1e-2  # the line is not this flow


def affine(points: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, beta of B(t) = alpha x_0 + beta for guides that are affine in x_0, and no two x_0
    alike: by the values at two samples."""
    first, second = bezier_point(points, t.expand(len(points)))[:2]
    alpha = (first - second) / (x_0[0] - x_0[1])
    return alpha, first - alpha * x_0[0]


@pytest.mark.parametrize(
    ("variant", "degree", "flows"),
    [("path", 2, (FLOW,)), ("path", 3, (FLOW,)), ("endpoint", 2, (WEAK, FLOW))],
    ids=["path2", "path3", "endpoint"],
)
def test_the_drift_alone_keeps_the_end_of_every_gaussian_path(variant, degree, flows):
    """B(t) = alpha x_0 + beta, so v = beta' + alpha'/alpha (x - beta) has no drift loss. Its ODE
    goes from each x_0 to the teacher's output: the end distribution is the teacher's."""
    batch = flow_batch(*flows)
    points = control_points(batch, variant, degree)

    def field(x: Tensor, t: Tensor) -> Tensor:
        (alpha, beta), (d_alpha, d_beta) = torch.func.jvp(
            lambda t: affine(points, batch.noise, t), (t,), (torch.ones_like(t),)
        )
        assert float(alpha.min()) > 0
        return d_beta + d_alpha / alpha * (x - beta)

    def student(x, t, s, label):
        return torch.stack([field(*pair) for pair in zip(x, t, strict=True)])

    settings = {"variant": variant, "degree": degree, "weight_map": 0.0, "weight_end": 0.0}
    assert losses(batch, student, **settings)["drift"] < 1e-20
    ends = solve(field, batch.noise, torch.tensor([0.0, 1.0]), "rk4", 64)[-1]
    torch.testing.assert_close(ends, batch.best[:, -1], rtol=0, atol=1e-5)


def test_the_drift_keeps_the_end_distribution_where_curves_cross():
    """Independent P_0 ~ N(0,1), P_1 ~ N(1,4), P_2 ~ N(2,1/4): B(t) is Gaussian with mean m(t),
    variance V(t), and the best drift E[B'|B] = m' + V'/(2V) (x - m) carries N(0,1) to N(2,1/4)."""
    means, variances = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 4.0, 0.25])
    means, variances = means.double(), variances.double()

    def moments(t: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
        return (weights * means).sum(), (weights**2 * variances).sum()

    def field(x: Tensor, t: Tensor) -> Tensor:
        (mean, variance), (d_mean, d_variance) = torch.func.jvp(
            moments, (t,), (torch.ones_like(t),)
        )
        return d_mean + d_variance / (2 * variance) * (x - mean)

    x_0 = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    ends = solve(field, x_0, torch.tensor([0.0, 1.0]), "rk4", 200)[-1]
    torch.testing.assert_close(ends, 2 + 0.5 * x_0, rtol=0, atol=1e-7)
    # It is the drift that the loss asks for: less of it or more of it is worse.
    points = torch.randn(50_000, 3, 1, generator=torch.Generator().manual_seed(0)).double()
    points = means[:, None] + variances.sqrt()[:, None] * points
    for t in (torch.tensor(0.3).double(), torch.tensor(0.6).double()):
        x, v = (f(points, t.expand(50_000)) for f in (bezier_point, bezier_velocity))
        best = field(x, t)
        gap = (v - best).square().mean()
        for offset, scale in itertools.product((-0.1, 0.0, 0.1), (0.9, 1.0, 1.1)):
            if (offset, scale) != (0.0, 1.0):
                other = offset + scale * best
                assert float((v - other).square().mean()) > float(gap)
