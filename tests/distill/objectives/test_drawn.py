"""Drawn targets: exact maps, what is drawn, each target's gradient, one call and what it costs."""

from dataclasses import replace

import pytest
import torch

from distill.config import ConfigError, ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.curve import curve_through
from distill.objectives.base import draw_strata
from distill.objectives.build import build_objective
from distill.objectives.config import KINDS, BezierConfig, TraFlowConfig
from distill.objectives.drawn import carried_on, draw_kind, draw_times
from distill.testing import NETWORKS, GaussianFlow, StraightFlow, flow_batch, random_network

IMAGE = ImageSpec(1, 4, 3)
ONES = torch.ones(IMAGE.shape, dtype=torch.float64)
FLOW, STRAIGHT = GaussianFlow(0.5 * ONES, 0.3), StraightFlow(0.5 * ONES, 0.3)
EQUAL = {f"share_{name}": 0.2 for name in KINDS if name != "change"}

both_networks = pytest.mark.parametrize("name", NETWORKS)


def alone(name: str, **settings) -> TraFlowConfig:
    """One kind of target for every sample."""
    shares = {f"share_{kind}": float(kind == name) for kind in KINDS if kind != "change"}
    return TraFlowConfig(**shares, **settings)


def drawn(count: int = 8192, **shares) -> tuple[torch.Tensor, ...]:
    """Kind, t, s and w of a large batch."""
    batch = flow_batch(GaussianFlow(torch.zeros(1).double(), 0.5), count=count)
    kind = draw_kind(list(TraFlowConfig(**shares).shares().values()), 0, 5, batch)
    return kind, *draw_times(kind, 0, 5, batch)


# -----------------------------------------------------------------------------------------------
# Exact maps


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_on_straight_paths_the_exact_map_has_no_loss(power, distance):
    """There the curve is the path itself."""
    config = TraFlowConfig(**EQUAL, power=power, distance=distance)
    batch = flow_batch(STRAIGHT)
    result = build_objective(config, 0).loss(batch, STRAIGHT.student, STRAIGHT.student, 3)
    assert set(result.terms) == set(KINDS)
    assert all(float(value) < 1e-12 for value in result.terms.values())


def test_on_curved_paths_the_exact_map_loses_what_the_curve_misses_which_is_of_fourth_order():
    losses = []
    for grid in (8, 16):
        objective = build_objective(TraFlowConfig(**EQUAL, power=1.0, distance="l2"), 0)
        batch = flow_batch(FLOW, grid=grid, count=256)
        losses.append(float(objective.loss(batch, FLOW.student, FLOW.student, 3).total))
    assert losses[0] < 1e-6 * float((batch.best[:, -1] - batch.noise).square().mean())
    assert losses[1] < losses[0] / 100  # 256 in the limit


def test_with_the_teachers_velocities_the_curve_misses_less():
    objective = build_objective(TraFlowConfig(**EQUAL, power=1.0, distance="l2"), 0)
    batch = flow_batch(FLOW, grid=4, count=256)
    given = [FLOW.velocity(batch.best[:, k], float(t)) for k, t in enumerate(batch.times)]
    with_velocities = replace(batch, velocities=torch.stack(given, dim=1)[:, None])
    losses = [
        float(objective.loss(one, FLOW.student, FLOW.student, 3).total)
        for one in (batch, with_velocities)
    ]
    assert losses[1] < losses[0] / 2


def test_the_jumps_to_stored_states_are_those_of_the_teacher():
    """0 -> 1 asks for X_K exactly, whatever the curve is between."""
    batch = flow_batch(FLOW, grid=1)
    result = build_objective(alone("output", distance="l2"), 0).loss(
        batch, FLOW.student, FLOW.student, 0
    )
    assert float(result.total) < 1e-24


# -----------------------------------------------------------------------------------------------
# What is drawn


def test_every_kind_gets_its_share_of_a_batch_up_to_one_sample():
    kind, *_ = drawn(1000)
    for index, share in enumerate(TraFlowConfig().shares().values()):
        assert abs(int((kind == index).sum()) - 1000 * share) <= 1


def test_jumps_are_those_of_their_kind_and_never_go_back():
    kind, t, s, w = drawn(**EQUAL)
    assert bool((t >= 0).all() and (t <= s).all() and (s <= w).all() and (w <= 1).all())
    for name, starts, ends in (
        ("output", True, True),
        ("start", True, False),
        ("end", False, True),
        ("change", False, False),
        ("consistency", False, False),
    ):
        of_kind = kind == KINDS.index(name)
        assert bool(((t == 0) == starts)[of_kind].all()), name
        assert bool(((w == 1) == ends)[of_kind].all()), name
        assert bool((s == w)[of_kind].all()) == (name != "consistency")


def test_times_are_uniform_and_those_of_two_are_sorted():
    kind, t, _, w = drawn(40_000, **EQUAL)
    s = w
    uniform = [s[kind == 1], t[kind == 2]]
    for name, n in (("change", 2), ("consistency", 3)):  # the least and the largest of n
        early, late = (times[kind == KINDS.index(name)] for times in (t, w))
        uniform += [1 - (1 - early) ** n, late**n]
    for values in uniform:
        assert len(values) > 7000
        quantiles = values.quantile(torch.linspace(0.1, 0.9, 9).double())
        torch.testing.assert_close(
            quantiles, torch.linspace(0.1, 0.9, 9).double(), atol=0.02, rtol=0
        )


def test_draws_do_not_depend_on_how_a_batch_is_split_and_change_from_step_to_step():
    batch = flow_batch(FLOW, count=16)
    whole = draw_strata(0, "drawn/kind", 5, batch)
    parts = [draw_strata(0, "drawn/kind", 5, part) for part in batch.split(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert sorted((16 * whole).long().tolist()) == list(range(16))
    assert not torch.equal(whole, draw_strata(0, "drawn/kind", 6, batch))
    assert not torch.equal(whole, draw_strata(1, "drawn/kind", 5, batch))


# -----------------------------------------------------------------------------------------------
# The targets


@both_networks
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_loss_is_that_of_its_words(name, power):
    """Each kind, written out with the map G and l2, from the drawn times."""
    student, target = random_network(name, IMAGE), random_network(name, IMAGE, seed=1)
    batch = flow_batch(FLOW, count=40)
    config = TraFlowConfig(**EQUAL, power=power, distance="l2")
    result = build_objective(config, 0).loss(batch, student, target, 4)
    kind = draw_kind(list(config.shares().values()), 0, 4, batch)
    t, s, w = draw_times(kind, 0, 4, batch)
    curve, label = curve_through(batch.best, batch.times), batch.condition
    x, gap = curve.at(t)[0], (w - t)[:, None, None, None]
    goal, rest = curve.at(s)[0], (w - s)[:, None, None, None]
    onward = goal + rest * target(goal, s, w, label)
    goal = torch.where((kind == KINDS.index("consistency"))[:, None, None, None], onward, goal)
    landed = x + gap * student(x, t, w, label)
    off = ((landed - goal) / gap ** (1 - power)).square().flatten(1).mean(dim=1)
    for index, which in enumerate(KINDS):
        expected = off[kind == index].sum() / 8  # a fifth of 40
        torch.testing.assert_close(result.terms[which], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(result.total, off.mean(), rtol=1e-6, atol=1e-9)


def test_a_jump_of_no_length_asks_for_the_slope_of_the_curve(monkeypatch):
    def at_one_time(kind, seed, step, batch):
        t = torch.linspace(0, 1, len(kind), dtype=torch.float64)
        return t, t, t

    monkeypatch.setattr("distill.objectives.drawn.draw_times", at_one_time)
    batch = flow_batch(FLOW)
    curve = curve_through(batch.best, batch.times)

    def knows(x, t, s, label):
        return curve.at(t)[1]

    config = TraFlowConfig(**EQUAL, power=0.0, distance="l2")
    assert float(build_objective(config, 0).loss(batch, knows, knows, 0).total) < 1e-24


def test_consistency_alone_hears_the_average():
    student, target = random_network("dit", IMAGE), random_network("dit", IMAGE, seed=1)
    other, batch = random_network("dit", IMAGE, seed=2), flow_batch(FLOW, count=20)
    objective = build_objective(TraFlowConfig(**EQUAL), 0)
    ours, theirs = (objective.loss(batch, student, u, 0).terms for u in (target, other))
    for name, value in ours.items():
        assert (float(value) == float(theirs[name])) == (name != "consistency")


def test_the_average_is_called_once_for_the_samples_that_drew_it_and_at_least_for_one():
    """All ranks call it equally often, whatever they drew: at stage 3 it is in parts on all."""
    rows = []

    def target(x, t, s, label):
        rows.append(len(x))
        return torch.ones_like(x)

    x, t = torch.zeros(8, 2).double(), torch.full((8,), 0.25).double()
    label = torch.zeros(8, dtype=torch.int64)
    for which in (torch.zeros(8, dtype=torch.bool), torch.arange(8) < 3):
        found = carried_on(x, t, t + 0.5, which, target, label)
        assert torch.equal(found, 0.5 * which[:, None].double().expand(-1, 2))
    assert rows == [1, 3]


def test_without_consistency_nobody_calls_the_average():
    def forbidden(x, t, s, label):
        raise AssertionError("called")

    config = TraFlowConfig(share_consistency=0.0)
    result = build_objective(config, 0).loss(flow_batch(FLOW), FLOW.student, forbidden, 0)
    assert set(result.terms) == set(KINDS) - {"consistency"}


@both_networks
def test_all_targets_cost_one_call_of_the_student(name):
    network, sizes = random_network(name, IMAGE), []

    def student(x, t, s, label):
        sizes.append(len(x))
        return network(x, t, s, label)

    build_objective(TraFlowConfig(), 0).loss(flow_batch(FLOW), student, network, 4)
    assert sizes == [16]


@both_networks
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_no_target_outweighs_another(name, distance):
    """By the gradient at the last layer, of equal shares. That of LPIPS: test_lpips."""
    network = random_network(name, IMAGE)
    engine = TorchEngine(network, TrainConfig(), torch.device("cpu"))
    objective = build_objective(TraFlowConfig(**EQUAL, distance=distance), 0)
    batch = flow_batch(FLOW, count=40)
    terms = objective.loss(batch, engine.student, engine.target, 1).terms
    norms = engine.gradient_norms(list(terms.values()))
    assert float(norms.max() / norms.min()) < 10


# -----------------------------------------------------------------------------------------------
# Shares


def test_shares_are_a_whole_and_what_is_left_is_any_jump():
    assert sum(TraFlowConfig().shares().values()) == pytest.approx(1)
    assert all(share > 0 for share in TraFlowConfig().shares().values())
    whole = TraFlowConfig(share_output=0.4, share_start=0.3, share_end=0.2, share_consistency=0.1)
    assert whole.shares()["change"] == 0
    batch = flow_batch(FLOW)
    assert "change" not in build_objective(whole, 0).loss(batch, *[FLOW.student] * 2, 0).terms


@pytest.mark.parametrize("kind", [TraFlowConfig, BezierConfig])
def test_shares_of_more_than_the_batch_are_refused_with_what_they_are(kind):
    with pytest.raises(ConfigError, match=r"share_output=0.9 .* are more than 1, the whole batch"):
        kind(share_output=0.9)
    with pytest.raises(ConfigError, match=r"objective.share_end=-0.1 must not be below 0"):
        kind(share_end=-0.1)
    with pytest.raises(ConfigError, match=r"objective.power=2.0 must be between 0 and 1"):
        kind(power=2.0)
