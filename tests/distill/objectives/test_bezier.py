"""Bezier: control points mix over teachers, by a number or by the class."""

import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.flow.curve import curve_through
from distill.objectives.bezier import mixed_curve
from distill.objectives.build import build_objective
from distill.objectives.config import BezierConfig, TraFlowConfig
from distill.teachers.config import NativeConfig, weight_table
from distill.testing import NETWORKS, GaussianFlow, flow_batch, random_network

IMAGE = ImageSpec(1, 4, 3)
ONES = torch.ones(IMAGE.shape, dtype=torch.float64)
FLOW, WEAK = GaussianFlow(0.5 * ONES, 0.3), GaussianFlow(0 * ONES, 1.5)

both_networks = pytest.mark.parametrize("name", NETWORKS)


def total(config, batch, name: str = "dit") -> float:
    student, target = random_network(name, IMAGE), random_network(name, IMAGE, seed=1)
    return float(build_objective(config, 0).loss(batch, student, target, 2).total)


@both_networks
def test_of_one_teacher_it_is_traflow(name):
    batch = flow_batch(FLOW)
    assert total(BezierConfig(), batch, name) == total(TraFlowConfig(), batch, name)


@both_networks
def test_identical_teachers_equal_one_whatever_their_weights(name):
    expected = total(BezierConfig(), flow_batch(FLOW), name)
    for weights in ([1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]):
        batch = flow_batch(FLOW, FLOW, FLOW, weights=weights)
        assert total(BezierConfig(), batch, name) == pytest.approx(expected, rel=1e-9)


def test_every_control_point_is_the_mixture_of_the_teachers():
    batch, piece = flow_batch(WEAK, FLOW, weights=[0.25, 0.75]), torch.arange(16) % 8
    weak, best = (
        curve_through(flow_batch(flow).best, batch.times).control_points(piece)
        for flow in (WEAK, FLOW)
    )
    mixed = mixed_curve(batch)
    torch.testing.assert_close(mixed.control_points(piece), 0.25 * weak + 0.75 * best)
    x, _ = mixed.at(torch.zeros(16).double())
    torch.testing.assert_close(x, batch.noise, rtol=0, atol=0)


def test_a_table_gives_each_class_its_own_teacher():
    """Labels are 0, 1, 2, 0 ..: class 1 has the weak teacher, the others the other one."""
    batch = flow_batch(WEAK, FLOW)
    teachers = {
        "weak": NativeConfig(weight=[0, 1, 0]),
        "best": NativeConfig(weight=[1.0, 0.0, 2.0]),
    }
    table = torch.tensor(weight_table(teachers, 3), dtype=torch.float64)
    batch.weights = table[batch.condition]
    routed = mixed_curve(batch)
    for label, index in ((0, 1), (1, 0), (2, 1)):
        rows = batch.condition == label
        assert torch.equal(routed.states[rows], batch.states[rows, index])


# -----------------------------------------------------------------------------------------------
# Weights as settings


def test_numbers_make_one_row_that_sums_to_one():
    teachers = {"a": NativeConfig(weight=1), "b": NativeConfig(weight=3.0)}
    assert weight_table(teachers, 10) == [[0.25, 0.75]]


def test_a_number_beside_a_list_stands_for_all_classes():
    teachers = {"a": NativeConfig(weight=[3, 0]), "b": NativeConfig()}
    assert weight_table(teachers, 2) == [[0.75, 0.25], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (([1, 0], [0, 1]), r"teacher.a.weight=\[1, 0\] must have one number for each of the 3 "),
        (([1, 0, 0], [0, 0, 2]), r"teacher.\*.weight is 0 for class 1 of every teacher"),
    ],
)
def test_a_table_that_leaves_a_class_out_is_refused(weights, message):
    teachers = {name: NativeConfig(weight=w) for name, w in zip("ab", weights, strict=True)}
    with pytest.raises(ConfigError, match=message):
        weight_table(teachers, 3)


@pytest.mark.parametrize("weight", [0, -1.0, [0, 0], [1, -1], "much", [1, "much"], True])
def test_a_weight_is_a_number_above_zero_or_a_list_of_some(weight):
    with pytest.raises(ConfigError, match=r"teacher.weight=.* must be a number above 0, or a list"):
        NativeConfig(weight=weight)
