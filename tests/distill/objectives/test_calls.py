"""What settings say of a loss is what it does: calls of the networks, work, and refusals."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from every_objective import EVERY, combinations, variants
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from distill.config import ConfigError, ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.paths import expand_as
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.objectives.base import Objective
from distill.objectives.build import build_objective
from distill.objectives.config import (
    OBJECTIVES,
    BezierConfig,
    Calls,
    ConsistencyConfig,
    DrawnConfig,
    EndpointConfig,
    GuidesConfig,
    LagrangianConfig,
    MeanFlowConfig,
    ObjectiveConfig,
    ProgressiveConfig,
    ReflowConfig,
    ShortcutConfig,
    SummedConfig,
    TraFlowConfig,
)
from distill.testing import GaussianFlow, flow_batch

ONES = torch.ones(1, 8, 8, dtype=torch.float64)
BATCH = flow_batch(GaussianFlow(-0.5 * ONES, 0.6), GaussianFlow(0.5 * ONES, 0.3), count=4)


class Counting:
    """u = w_last sin(w_body x + t - 2 s), which counts calls, and what gradient goes back."""

    def __init__(self, is_trained: bool) -> None:
        self.body = torch.tensor(1.1, dtype=torch.float64, requires_grad=is_trained)
        self.last = torch.tensor(0.9, dtype=torch.float64, requires_grad=is_trained)
        self.rows: list[float] = []
        self.is_dual: list[bool] = []
        self.passes_back: Counter[int] = Counter()  # through the body, by call

    def __call__(self, x, t, s, label):
        call = len(self.rows)
        self.rows.append(len(x) / len(BATCH.ids))
        self.is_dual.append(any(forward_ad.unpack_dual(v).tangent is not None for v in (x, t, s)))
        hidden = torch.sin(self.body * x + expand_as(t - 2 * s, x))
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.passes_back.update([call]))
        return self.last * hidden

    def sums(self, is_dual: bool, passes: int) -> float:
        """Rows of the calls in forward mode or not that gradient went back through so often."""
        return sum(
            rows
            for call, rows in enumerate(self.rows)
            if self.is_dual[call] == is_dual and self.passes_back[call] == passes
        )


def calls_made(config: ObjectiveConfig) -> Calls:
    """The calls of one sample, counted in a step."""
    student, target = Counting(is_trained=True), Counting(is_trained=False)

    def gradient_norms(losses):
        return torch.stack(
            [torch.autograd.grad(loss, student.last, retain_graph=True)[0].abs() for loss in losses]
        )

    objective = build_objective(config, seed=0, gradient_norms=gradient_norms)
    objective.loss(BATCH, student, target, 0).total.backward()
    assert max(student.passes_back.values()) == 1
    again = target.sums(False, 2)
    return Calls(
        weights=student.sums(False, 1),
        plain=student.sums(False, 0) + target.sums(False, 0),
        inputs=target.sums(False, 1) + again,
        tangents=student.sums(True, 0) + target.sums(True, 0),
        passes=again,
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_calls_of_a_loss_are_those_that_it_makes(name):
    """Whatever is chosen, whichever terms are on."""
    for config in combinations(OBJECTIVES[name]):
        assert config.calls() == calls_made(config), config


ALL_TERMS = SummedConfig(weight_consistency=1.0, weight_flow_matching=1.0)
# torch's counter does not see forward mode rightly.
COUNTED = {name: config for name, config in EVERY.items() if not config.calls().tangents}
COUNTED |= {  # one of the four samples
    name: replace(config, share_consistency=0.25)
    for name, config in COUNTED.items()
    if isinstance(config, DrawnConfig) and config.share_consistency > 0
}
COUNTED |= {"all": ALL_TERMS, "all-adaptive": replace(ALL_TERMS, weights="adaptive")}


@pytest.mark.parametrize("config", COUNTED.values(), ids=list(COUNTED))
def test_work_in_forwards_is_what_torch_counts_in_a_step(config):
    image = ImageSpec(1, 8, 10)
    network = build_network(DiTConfig(patch_size=2, width=64, depth=4, num_heads=4), image)
    engine = TorchEngine(network.double(), TrainConfig(), torch.device("cpu"))
    objective = build_objective(config, seed=0, gradient_norms=engine.gradient_norms)
    with FlopCounterMode(display=False) as forward:
        engine.target(BATCH.noise, torch.zeros(4), torch.ones(4), BATCH.condition)
    with FlopCounterMode(display=False) as step:
        loss = objective.loss(BATCH, engine.student, engine.target, 0).total
        engine.backward(loss, last=True)
    ratio = step.get_total_flops() / forward.get_total_flops()
    # the first layer has no gradient to its input
    assert ratio == pytest.approx(config.calls().in_forwards, rel=0.02)


# -----------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("points", [[0, 8], [0, 4, 8], list(range(9))], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_stored_states_that_are_not_refused_are_enough(name, points):
    config, student = EVERY[name], Counting(is_trained=True)
    try:
        config.check_run(TrainConfig(), 8, points)
    except ConfigError as error:
        assert len(points) < 9  # all states are always enough
        assert "trajectory." in str(error)
        return
    batch = replace(BATCH, states=BATCH.states[:, :, points], times=BATCH.times[points])
    objective = build_objective(config, 0, gradient_norms=lambda losses: torch.ones(len(losses)))
    assert bool(torch.isfinite(objective.loss(batch, student, student, 0).total))


def ways_to_train() -> list[TrainConfig]:
    """Every precision at every stage, recomputed, and compiled."""
    found = []
    for precision in ("fp32", "bf16", "fp16"):
        plain = TrainConfig(precision=precision)
        found += [replace(plain, zero_stage=stage) for stage in range(4)]
        found += [replace(plain, activation_checkpointing=True), replace(plain, compile=True)]
    return found


def is_refused(config: ObjectiveConfig, train: TrainConfig) -> bool:
    """Whether it is. The setting that the message names as the way out is one: with it all is well.

    That rounding spoils those that are refused in 16 bits, and no other, test_precision measures.
    """
    try:
        config.check_run(train, 8, list(range(9)))
    except ConfigError as error:
        message = str(error)
    else:
        return False
    section, name, value = re.search(r"; set (objective|train)\.(\w+)=(\w+)", message).groups()
    if section == "train":
        train = replace(train, **{name: value})
    else:
        config = replace(config, **{name: value})
    config.check_run(train, 8, list(range(9)))
    return True


@pytest.mark.parametrize("name", EVERY)
def test_a_refusal_names_a_way_out(name):
    assert not is_refused(EVERY[name], TrainConfig())
    for train in ways_to_train():
        is_refused(EVERY[name], train)


@pytest.mark.parametrize("kind", [GuidesConfig, MeanFlowConfig, LagrangianConfig])
def test_a_difference_over_a_small_step_is_refused_in_16_bits(kind):
    for train in ways_to_train():
        assert is_refused(kind(), train) == (train.precision != "fp32")
        assert not is_refused(kind(derivative="jvp"), train)


@pytest.mark.parametrize(
    "kind",
    [
        TraFlowConfig,
        BezierConfig,
        SummedConfig,
        EndpointConfig,
        ReflowConfig,
        ConsistencyConfig,
        ShortcutConfig,
        ProgressiveConfig,
    ],
)
def test_other_losses_train_at_every_precision_and_stage(kind):
    assert not any(is_refused(c, t) for c in variants(kind).values() for t in ways_to_train())


# -----------------------------------------------------------------------------------------------
# Nothing can be left out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_the_name_of_its_row_and_a_loss(name):
    config = OBJECTIVES[name]()
    assert config.name == name
    assert isinstance(build_objective(config, 0), Objective)


@pytest.mark.parametrize("left_out", ["calls", "check_run"])
def test_settings_that_leave_out_calls_or_refusals_cannot_be_made(left_out):
    methods = {name: vars(EndpointConfig)[name] for name in ("calls", "check_run")}
    del methods[left_out]
    with pytest.raises(TypeError, match=f"abstract.* '?{left_out}'?"):
        type("Forgetful", (ObjectiveConfig,), methods)(name="forgetful")


def test_settings_without_a_loss_are_said_to_have_none():
    class Unknown(ObjectiveConfig):
        calls, check_run = EndpointConfig.calls, EndpointConfig.check_run

    with pytest.raises(TypeError, match="no objective for Unknown"):
        build_objective(Unknown(name="unknown"), 0)
