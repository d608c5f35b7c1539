"""The baselines: where each has no loss, and what it reads."""

import pytest
import torch

from distill.config import ImageSpec
from distill.objectives.base import draw_index
from distill.objectives.build import build_objective
from distill.objectives.config import (
    ConsistencyConfig,
    EndpointConfig,
    MeanFlowConfig,
    ReflowConfig,
)
from distill.objectives.distances import pseudo_huber
from distill.objectives.reflow import u_shaped
from distill.testing import NETWORKS, GaussianFlow, StraightFlow, flow_batch, random_network

IMAGE = ImageSpec(1, 4, 3)
MEAN = torch.full(IMAGE.shape, 0.5, dtype=torch.float64)
FLOW, STRAIGHT = GaussianFlow(MEAN, 0.3), StraightFlow(MEAN, 0.3)


def loss(config, batch, student, target=None) -> float:
    objective = build_objective(config, 0)
    return float(objective.loss(batch, student, target or student, 3).total.detach())


# -----------------------------------------------------------------------------------------------
# Exact maps


@pytest.mark.parametrize("config", [ConsistencyConfig(), EndpointConfig()], ids=["ctm", "endpoint"])
def test_the_exact_flow_map_has_no_loss(config):
    assert loss(config, flow_batch(FLOW), FLOW.student) < 1e-20


@pytest.mark.parametrize(
    "config",
    [
        EndpointConfig(),
        ReflowConfig(),
        ReflowConfig(times="u_shaped"),
        ConsistencyConfig(),
        MeanFlowConfig(derivative="jvp"),
        MeanFlowConfig(derivative="finite_difference"),
    ],
    ids=["endpoint", "reflow", "u-shaped", "ctm", "meanflow-jvp", "meanflow-finite"],
)
def test_on_straight_paths_all_agree_on_the_straight_map(config):
    assert loss(config, flow_batch(STRAIGHT), STRAIGHT.student) < 1e-12


@pytest.mark.parametrize("config", [ReflowConfig(), MeanFlowConfig()], ids=["reflow", "meanflow"])
def test_on_curved_paths_the_next_rectified_flow_is_another_model(config):
    """Both learn the straight pairs of the teacher, so the teacher's own map has a loss."""
    assert loss(config, flow_batch(FLOW), FLOW.student) > 1e-3


def test_reflow_of_gaussian_pairs_has_the_straight_flow_as_its_answer():
    """The pairs x_1 = m + c x_0 of the curved Gaussian flow are those of the straight one."""
    assert loss(ReflowConfig(), flow_batch(FLOW), STRAIGHT.student) < 1e-24
    assert loss(MeanFlowConfig(derivative="jvp"), flow_batch(FLOW), STRAIGHT.student) < 1e-12


def test_consistency_is_blind_to_the_end_where_its_target_is():
    """A student that never moves agrees with itself only if the teacher does not move either."""

    def still(x, t, s, label):
        return 0 * x

    assert loss(ConsistencyConfig(), flow_batch(FLOW), still) > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_consistency_target_is_the_average_and_not_the_student(name):
    student, batch = random_network(name, IMAGE), flow_batch(FLOW)
    ours, other = (
        loss(ConsistencyConfig(), batch, student, target)
        for target in (student, random_network(name, IMAGE, seed=1))
    )
    assert abs(ours - other) > 1e-3


@pytest.mark.parametrize("p_diagonal", [0.0, 0.5, 1.0])
def test_meanflow_takes_the_diagonal_with_its_chance(p_diagonal):
    batch, seen = flow_batch(FLOW, count=2000), []

    def student(x, t, s, label):
        seen.append((t == s).double().mean())
        return x

    loss(MeanFlowConfig(p_diagonal=p_diagonal), batch, student)
    assert float(seen[0]) == pytest.approx(p_diagonal, abs=0.05)


# -----------------------------------------------------------------------------------------------
# Draws and distances


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
