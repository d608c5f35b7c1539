"""Who is listened to: every term hears the teacher, and gradient reaches the student alone."""

from dataclasses import replace

import pytest
import torch
from every_objective import EVERY
from torch import nn

from distill.config import ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.objectives.build import build_objective
from distill.objectives.config import ConsistencyConfig, GuidesConfig, SummedConfig
from distill.testing import NETWORKS, GaussianFlow, flow_batch, random_network

CLASSES, NO_CLASSES = ImageSpec(1, 4, 3), ImageSpec(1, 4, 0)
ONES = torch.ones(CLASSES.shape, dtype=torch.float64)
FLOW, OTHER = GaussianFlow(0.5 * ONES, 0.3), GaussianFlow(-0.5 * ONES, 0.6)
EVERY_TERM = SummedConfig(weight_consistency=1.0, weight_flow_matching=1.0)
# Every objective that exists, and settings of some together. Adaptive weights are no part of a
# term, and test_summed has them.
ALL = {name: config for name, config in EVERY.items() if name != "traflow_summed-weights=adaptive"}
ALL |= {
    "summed-every-term": EVERY_TERM,
    "summed-any-jump": SummedConfig(sampler_nfe=[]),
    "summed-straight": replace(EVERY_TERM, velocity_mode="straight", distance="l2"),
    "guides-cubic-jvp": GuidesConfig(degree=3, derivative="jvp"),
}

both_networks = pytest.mark.parametrize("name", NETWORKS)
each_objective = pytest.mark.parametrize("config", ALL.values(), ids=list(ALL))


def pair(name: str, image: ImageSpec = CLASSES) -> tuple[nn.Module, nn.Module]:
    """A student and a target."""
    return random_network(name, image), random_network(name, image, seed=1)


@both_networks
@each_objective
def test_another_teacher_changes_every_term(config, name):
    student, target = pair(name)
    objective = build_objective(config, 0)
    ours, other = (
        objective.loss(flow_batch(flow), student, target, 0).terms for flow in (FLOW, OTHER)
    )
    assert ours.keys() == other.keys()
    for term, value in ours.items():
        assert abs(float(value - other[term])) > 1e-3 * float(value), term


@each_objective
def test_a_weaker_teacher_is_heard_by_the_objectives_that_take_several(config):
    """All others read the last one alone."""
    student, target = pair("dit")
    objective = build_objective(config, 0)
    losses = [
        float(objective.loss(flow_batch(weak, FLOW), student, target, 0).total)
        for weak in (FLOW, OTHER)
    ]
    takes_several = config.name.startswith("bezier") and "straight" not in vars(config).values()
    assert (losses[0] != losses[1]) == takes_several


@both_networks
@each_objective
def test_gradient_reaches_the_student_and_neither_target_nor_data(config, name):
    student, batch = random_network(name, CLASSES), flow_batch(FLOW)
    engine = TorchEngine(student, TrainConfig(), torch.device("cpu"))
    states = batch.states.clone()
    average = {f.name: f.data.clone() for f in engine.fragments() if f.kind == "ema/target"}
    result = build_objective(config, 0).loss(batch, engine.student, engine.target, 0)
    for term, value in result.terms.items():
        (grad,) = torch.autograd.grad(value, [student.last_layer], retain_graph=True)
        assert float(grad.abs().max()) > 0, term
    engine.backward(result.total, last=True)
    t = torch.zeros(16, dtype=torch.float64)
    assert not engine.target(batch.noise, t, t + 1, batch.condition).requires_grad
    assert not batch.states.requires_grad
    assert torch.equal(batch.states, states)
    for fragment in engine.fragments():
        if fragment.kind == "ema/target":
            assert torch.equal(fragment.data, average[fragment.name])


def test_the_consistency_target_is_a_constant_to_the_teachers_states():
    """State K is only ever the state b of L_con: were its side not held fixed, it would have a
    gradient here. The student's side, from states before it, has one."""
    student, target = pair("dit")
    batch = flow_batch(FLOW)
    batch.states.requires_grad_()
    result = build_objective(ConsistencyConfig(), 0).loss(batch, student, target, 0)
    (grad,) = torch.autograd.grad(result.total, [batch.states])
    assert float(grad[:, :, :-1].abs().max()) > 0
    assert float(grad[:, :, -1].abs().max()) == 0


@both_networks
@each_objective
def test_a_loss_is_the_mean_over_any_split_of_the_batch(config, name):
    student, target = pair(name)
    objective, batch = build_objective(config, 0), flow_batch(FLOW, count=8)
    whole = float(objective.loss(batch, student, target, 5).total)
    parts = [float(objective.loss(p, student, target, 5).total) for p in batch.split(2)]
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-6)


@both_networks
@each_objective
def test_with_classes_the_label_matters_and_without_none_is_enough(config, name):
    objective, batch = build_objective(config, 0), flow_batch(FLOW, count=4)
    nobody = replace(batch, condition=torch.full_like(batch.condition, -1))
    losses = [
        objective.loss(some, *pair(name, image), 0).total
        for some, image in ((batch, CLASSES), (nobody, CLASSES), (nobody, NO_CLASSES))
    ]
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    assert abs(float(losses[0] - losses[1])) > 1e-6
