"""Limits that hold for any right implementation: exact maps have no loss, teachers matter."""

import pytest
import torch
from torch import Tensor, nn

from distill.config import DiTConfig, ImageSpec
from distill.networks import build_network
from distill.objective_config import (
    BezierConfig,
    ConsistencyConfig,
    EndpointConfig,
    MeanFlowConfig,
    ObjectiveConfig,
    ReflowConfig,
    TraFlowConfig,
)
from distill.objectives import build_objective
from distill.objectives.base import draw, draw_index, l2, loss_terms, pseudo_huber
from distill.objectives.bezier import control_points
from distill.objectives.reflow import flow_matching_term, u_shaped
from distill.testing import GaussianFlow
from distill.trajectory import TrajectoryBatch

IMAGE = ImageSpec(1, 4, 3)
GRID = torch.linspace(0, 1, 9, dtype=torch.float64)
FLOW = GaussianFlow(torch.full(IMAGE.shape, 0.5, dtype=torch.float64), 0.3)

TERMS = ("output", "states", "velocity", "consistency", "flow_matching")


def traflow(*terms: str, **settings) -> TraFlowConfig:
    weights = {f"weight_{term}": float(term in terms) for term in TERMS}
    return TraFlowConfig(**{**weights, "distance": "l2", "sampler_nfe": [], **settings})


def batch_of(states: Tensor, times: Tensor = GRID) -> TrajectoryBatch:
    n, teachers = states.shape[:2]
    return TrajectoryBatch(
        states=states,
        times=times,
        weights=torch.full((teachers,), 1 / teachers, dtype=states.dtype),
        labels=torch.arange(n) % 3,
        ids=torch.arange(n),
        positions=torch.arange(n),
        global_size=n,
    )


def noise(n: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *IMAGE.shape, dtype=torch.float64, generator=generator)


def gaussian_batch(*flows: GaussianFlow) -> TrajectoryBatch:
    x_0 = noise()
    paths = [torch.stack([flow.map(x_0, 0.0, float(t)) for t in GRID], dim=1) for flow in flows]
    return batch_of(torch.stack(paths, dim=1))


def straight_batch() -> tuple[TrajectoryBatch, Tensor]:
    """A teacher whose paths are straight: x_1 = x_0 + shift."""
    x_0, shift = noise(), torch.full(IMAGE.shape, 0.7, dtype=torch.float64)
    path = torch.stack([x_0 + t * shift for t in GRID], dim=1)
    return batch_of(path[:, None]), shift


def small_network(seed: int = 0) -> nn.Module:
    network = build_network(DiTConfig(patch_size=2, width=16, depth=1, num_heads=2), IMAGE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.double()


ALL = [
    TraFlowConfig(),
    traflow("velocity", velocity_mode="straight"),
    traflow("flow_matching"),
    BezierConfig(variant="path", weight_drift=1.0),
    BezierConfig(variant="endpoint", degree=1),
    BezierConfig(variant="straight"),
    EndpointConfig(),
    ReflowConfig(),
    ConsistencyConfig(),
    MeanFlowConfig(),
]
IDS = [f"{c.name}-{i}" for i, c in enumerate(ALL)]


# -----------------------------------------------------------------------------------------------
# Exact maps


@pytest.mark.parametrize(
    "config",
    [traflow("output"), traflow("consistency"), ConsistencyConfig(), EndpointConfig()],
    ids=["output", "consistency", "ctm", "endpoint"],
)
def test_the_exact_flow_map_has_no_loss(config):
    batch = gaussian_batch(FLOW)
    result = build_objective(config, 0).loss(batch, FLOW.student, FLOW.student, 3)
    assert float(result.total) < 1e-24


def test_the_exact_flow_map_has_no_trajectory_velocity_loss():
    # The change of G over a grid interval is the change of the stored states.
    result = build_objective(traflow("velocity"), 0).loss(
        gaussian_batch(FLOW), FLOW.student, FLOW.student, 3
    )
    assert float(result.total) < 1e-24


@pytest.mark.parametrize(
    "config",
    [
        traflow(*TERMS),
        traflow("velocity", velocity_mode="straight"),
        ReflowConfig(),
        MeanFlowConfig(distance="l2", derivative="jvp"),
        BezierConfig(distance="l2", variant="path", degree=3, derivative="jvp", weight_drift=1.0),
    ],
    ids=["traflow", "straight-velocity", "reflow", "meanflow", "bezier"],
)
def test_on_straight_paths_every_objective_agrees_on_the_straight_map(config):
    batch, shift = straight_batch()

    def student(x, t, s, label):
        return shift.expand_as(x)

    assert float(build_objective(config, 0).loss(batch, student, student, 1).total) < 1e-20


def test_on_curved_paths_straight_velocity_and_the_flow_map_disagree():
    config = traflow("velocity", velocity_mode="straight")
    batch = gaussian_batch(FLOW)
    assert float(build_objective(config, 0).loss(batch, FLOW.student, FLOW.student, 3).total) > 1e-3


# -----------------------------------------------------------------------------------------------
# Who is listened to


@pytest.mark.parametrize("config", ALL, ids=IDS)
def test_another_teacher_gives_another_loss(config):
    student, target = small_network(), small_network(1)
    other = GaussianFlow(torch.full(IMAGE.shape, -0.5, dtype=torch.float64), 0.6)
    objective = build_objective(config, 0)
    losses = [
        float(objective.loss(gaussian_batch(flow), student, target, 0).total)
        for flow in (FLOW, other)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("config", ALL, ids=IDS)
def test_gradient_reaches_the_student_and_neither_target_nor_data(config):
    student, target = small_network(), small_network(1)
    batch = gaussian_batch(FLOW)
    target.requires_grad_(False)
    batch.states.requires_grad_(False)
    build_objective(config, 0).loss(batch, student, target, 0).total.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in target.parameters())
    assert batch.states.grad is None


def test_the_consistency_target_is_the_average_and_not_the_student():
    student, batch = small_network(), gaussian_batch(FLOW)
    objective = build_objective(ConsistencyConfig(), 0)
    ours, other = (
        float(objective.loss(batch, student, target, 0).total)
        for target in (student, small_network(1))
    )
    assert abs(ours - other) > 1e-3


@pytest.mark.parametrize("config", ALL, ids=IDS)
def test_a_loss_is_the_mean_over_any_split_of_the_batch(config):
    student, target = small_network(), small_network(1)
    objective, batch = build_objective(config, 0), gaussian_batch(FLOW)
    whole = float(objective.loss(batch, student, target, 5).total)
    parts = [float(objective.loss(p, student, target, 5).total) for p in batch.split(4)]
    assert whole == pytest.approx(sum(parts) / 4, rel=1e-6)


def test_a_term_of_weight_zero_is_not_computed():
    def forbidden(x, t, s, label):
        raise AssertionError("called")

    result = build_objective(traflow("output"), 0).loss(
        gaussian_batch(FLOW), FLOW.student, forbidden, 0
    )
    assert set(result.terms) == {"output"}


def test_no_label_means_no_label():
    batch = gaussian_batch(FLOW)
    batch.labels = torch.full_like(batch.labels, -1)
    result = build_objective(TraFlowConfig(), 0).loss(batch, small_network(), small_network(1), 0)
    assert torch.isfinite(result.total)


# -----------------------------------------------------------------------------------------------
# Bezier


def bezier_losses(batch: TrajectoryBatch, **settings) -> dict[str, float]:
    config = BezierConfig(distance="l2", weight_drift=1.0, derivative="jvp", **settings)
    result = build_objective(config, 0).loss(batch, small_network(), small_network(1), 0)
    return {name: float(value) for name, value in result.terms.items()}


def test_a_straight_line_as_a_curve_of_any_degree_gives_the_same_losses():
    batch, _ = straight_batch()
    expected = bezier_losses(batch, variant="straight", degree=1)
    for degree in (2, 3):
        found = bezier_losses(batch, variant="path", degree=degree)
        assert found == pytest.approx(expected, rel=1e-9)


def test_k_identical_teachers_equal_one():
    one, three = gaussian_batch(FLOW), gaussian_batch(FLOW, FLOW, FLOW)
    expected = bezier_losses(one, variant="path", degree=3)
    assert bezier_losses(three, variant="path", degree=3) == pytest.approx(expected, rel=1e-9)


def test_the_straight_drift_is_reflow():
    batch, student = gaussian_batch(FLOW), small_network()
    settings = {"weight_drift": 1.0, "weight_map": 0.0, "weight_end": 0.0, "distance": "l2"}
    bezier = build_objective(BezierConfig(variant="straight", **settings), 0)
    ours = bezier.loss(batch, student, student, 2).total
    t = draw(0, "bezier/t", 2, batch)  # the two objectives name their draws differently
    reflow = flow_matching_term(batch, t, l2, 1.0)
    expected = loss_terms({"flow_matching": reflow}, student, batch.labels).total
    torch.testing.assert_close(ours, expected)


def test_endpoint_guides_are_the_outputs_weakest_first():
    weak = GaussianFlow(torch.zeros(IMAGE.shape, dtype=torch.float64), 1.5)
    batch = gaussian_batch(weak, FLOW)
    points = control_points(batch, "endpoint", 2)
    assert torch.equal(points[:, 0], batch.noise)
    assert torch.equal(points[:, 1], batch.states[:, 0, -1])
    assert torch.equal(points[:, 2], batch.states[:, 1, -1])
    with pytest.raises(ValueError, match="degree 3 needs as many teachers, not 2"):
        control_points(batch, "endpoint", 3)


# -----------------------------------------------------------------------------------------------
# Derivatives, draws, distances


@pytest.mark.parametrize("make", [MeanFlowConfig, BezierConfig], ids=["meanflow", "bezier"])
def test_finite_difference_and_jvp_agree(make):
    settings = {} if make is MeanFlowConfig else {"variant": "path"}
    losses = [
        float(
            build_objective(make(distance="l2", derivative=derivative, **settings), 0)
            .loss(gaussian_batch(FLOW), small_network(), small_network(1), 0)
            .total
        )
        for derivative in ("jvp", "finite_difference")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)  # first order in the step 5e-3


def test_drawn_indices_stay_in_range_and_reach_both_ends():
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert draw_index(u, 2, 4).tolist() == [2, 3, 4]
    assert draw_index(u, 4, 4).tolist() == [4, 4, 4]


def test_u_shaped_times_have_the_density_they_claim():
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)
    t = u_shaped(u)
    assert t[0] == pytest.approx(0, abs=1e-12)
    assert t[-1] == pytest.approx(1, abs=1e-12)
    density = 1 / torch.gradient(t, spacing=float(u[1]))[0]
    shape = torch.cosh(4 * (t - 0.5))
    ratio = (density / shape)[100:-100]
    assert float(ratio.std() / ratio.mean()) < 1e-3


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    a = torch.zeros(1, 1, 10, 10, dtype=torch.float64)
    c = 0.00054 * 100

    def at(r: float) -> float:
        return float(pseudo_huber(a + r / 10, a))  # |a - b| = r

    assert at(1e-4) == pytest.approx(1e-8 / (2 * c), rel=1e-3)
    assert at(100.0) == pytest.approx(100 - c, rel=1e-3)


def test_objectives_know_only_their_configurations():
    with pytest.raises(TypeError, match="no objective for ObjectiveConfig"):
        build_objective(ObjectiveConfig(name="x"), 0)
