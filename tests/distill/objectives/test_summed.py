"""TraFlow: limits of its terms, the sampler's jumps, one student call, adaptive weights."""

import collections

import pytest
import torch
from torch import Tensor

from cluster.settings.hydra import compose
from distill.config import ConfigError, ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.times import DRILLED
from distill.objectives.base import LossTerms
from distill.objectives.build import build_objective
from distill.objectives.config import SummedConfig
from distill.objectives.summed import ADAPTIVE_RANGE, balanced, draw_jump
from distill.sample import few_step
from distill.testing import NETWORKS, GaussianFlow, StraightFlow, flow_batch, random_network

IMAGE = ImageSpec(1, 4, 3)
MEAN = torch.full(IMAGE.shape, 0.5, dtype=torch.float64)
FLOW, STRAIGHT = GaussianFlow(MEAN, 0.3), StraightFlow(MEAN, 0.3)
TERMS = ("output", "states", "velocity", "consistency", "flow_matching")

both_networks = pytest.mark.parametrize("name", NETWORKS)


def summed(*terms: str, **settings) -> SummedConfig:
    weights = {f"weight_{term}": float(term in terms) for term in TERMS}
    return SummedConfig(**{**weights, "distance": "l2", **settings})


# -----------------------------------------------------------------------------------------------
# Exact maps


@pytest.mark.parametrize("sampler_nfe", [[], [1, 2, 4, 8]], ids=["any", "sampler"])
def test_the_exact_flow_map_has_no_loss(sampler_nfe):
    config = summed("output", "states", "velocity", "consistency", sampler_nfe=sampler_nfe)
    result = build_objective(config, 0).loss(flow_batch(FLOW), FLOW.student, FLOW.student, 3)
    assert set(result.terms) == {"output", "states", "velocity", "consistency"}
    assert all(float(value) < 1e-24 for value in result.terms.values())


@pytest.mark.parametrize("mode", ["trajectory", "straight"])
def test_on_straight_paths_every_term_agrees_on_the_straight_map(mode):
    objective = build_objective(summed(*TERMS, velocity_mode=mode), 0)
    result = objective.loss(flow_batch(STRAIGHT), STRAIGHT.student, STRAIGHT.student, 1)
    assert set(result.terms) == set(TERMS)
    assert all(float(value) < 1e-24 for value in result.terms.values())


def test_on_curved_paths_the_anchor_and_the_flow_map_disagree():
    objective = build_objective(summed("flow_matching"), 0)
    assert float(objective.loss(flow_batch(FLOW), FLOW.student, FLOW.student, 1).total) > 1e-3


@pytest.mark.parametrize("nfe", [1, 2, 3, 8])
def test_the_exact_flow_map_reaches_the_end_in_any_number_of_jumps(nfe):
    batch = flow_batch(FLOW)
    found = few_step(FLOW.student, batch.noise, batch.condition, nfe)
    torch.testing.assert_close(found, batch.best[:, -1], rtol=1e-12, atol=1e-12)


# -----------------------------------------------------------------------------------------------
# Jumps


def jumps_of_the_sampler(nfe: int, grid: int) -> list[tuple[int, int]]:
    """Grid indices of the jumps that sampling with `nfe` evaluations makes."""
    seen = []

    def u(x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        seen.append((round(float(t[0]) * grid), round(float(s[0]) * grid)))
        return x

    few_step(u, torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.int64), nfe, DRILLED)
    return seen


def drawn(nfe: list[int], grid: int = 8, count: int = 9600) -> collections.Counter:
    batch = flow_batch(GaussianFlow(torch.zeros(1).double(), 0.5), grid=grid, count=count)
    a, b = draw_jump(batch.times, nfe, 0, 5, batch)
    return collections.Counter(zip(a.tolist(), b.tolist(), strict=True))


def test_only_the_jumps_of_the_sampler_are_drawn_by_their_length_each_level_equally_often():
    found, levels = drawn([2, 4, 8]), {n: jumps_of_the_sampler(n, 8) for n in (2, 4, 8)}
    expected: collections.Counter = collections.Counter()
    for jumps in levels.values():  # 3/4 -> 1 is a jump of two samplers
        expected.update({(a, b): 3200 * (b - a) / 8 for a, b in jumps})
    assert found.keys() == expected.keys()
    for jump, count in expected.items():
        assert found[jump] == pytest.approx(count, rel=0.25)


def test_the_whole_jump_is_a_level_too_and_levels_need_not_be_powers_of_two():
    assert drawn([1, 3], grid=6).keys() == {(0, 6), (0, 2), (2, 4), (4, 6)}


def test_an_empty_list_draws_any_two_times_of_the_grid():
    assert drawn([], grid=4).keys() == {(a, b) for a in range(4) for b in range(a + 1, 5)}


def test_a_grid_without_the_times_of_the_sampler_is_refused():
    objective = build_objective(summed("states", sampler_nfe=[2, 4]), 0)
    batch = flow_batch(FLOW, grid=6)
    with pytest.raises(ConfigError, match=r"sampler_nfe=\[2, 4\] visits times that are not stored"):
        objective.loss(batch, FLOW.student, FLOW.student, 0)


# -----------------------------------------------------------------------------------------------
# One call of the student


@both_networks
def test_all_terms_together_are_the_terms_alone_and_cost_one_call(name):
    student, target = random_network(name, IMAGE), random_network(name, IMAGE, seed=1)
    batch, sizes = flow_batch(FLOW), []

    def counted(x, t, s, label):
        sizes.append(len(x) // len(batch.ids))
        return student(x, t, s, label)

    whole = build_objective(summed(*TERMS), 0).loss(batch, counted, target, 4)
    assert sizes == [5]  # one for each term: the velocity shares the jump of the states
    for term in TERMS:
        alone = build_objective(summed(term), 0).loss(batch, student, target, 4)
        assert set(alone.terms) == {term}
        torch.testing.assert_close(alone.total, whole.terms[term], rtol=1e-10, atol=1e-12)
    total = sum(float(value) for value in whole.terms.values())
    assert float(whole.total) == pytest.approx(total, rel=1e-12)


def test_a_term_of_weight_zero_is_not_computed():
    def forbidden(x, t, s, label):
        raise AssertionError("called")

    objective = build_objective(summed("output"), 0)
    result = objective.loss(flow_batch(FLOW), FLOW.student, forbidden, 0)
    assert set(result.terms) == {"output"}


# -----------------------------------------------------------------------------------------------
# Adaptive weights


def engine_of(name: str) -> TorchEngine:
    network = random_network(name, IMAGE)
    return TorchEngine(network, TrainConfig(), torch.device("cpu"))


@both_networks
def test_adapted_terms_pull_equally_hard_on_the_last_layer(name):
    engine, batch = engine_of(name), flow_batch(FLOW)
    config = summed(*TERMS, weights="adaptive")
    objective = build_objective(config, 0, gradient_norms=engine.gradient_norms)
    result = objective.loss(batch, engine.student, engine.target, 1)
    weights = [float(weight) for weight in result.weights.values()]
    assert all(0.011 < weight < 9.9 for weight in weights)  # none is clipped
    assert len({round(weight, 3) for weight in weights}) == len(TERMS)
    weighted = [result.weights[term] * value for term, value in result.terms.items()]
    pulls = engine.gradient_norms(weighted)
    torch.testing.assert_close(pulls, pulls[:1].expand(len(TERMS)), rtol=1e-5, atol=0)
    assert not any(weight.requires_grad for weight in result.weights.values())


def test_adapted_weights_multiply_the_configured_ones_and_are_clipped():
    terms = {name: torch.tensor(1.0) for name in "abcde"}
    given = dict(zip("abcde", (2.0, 1.0, 3.0, 1.0, 1.0), strict=True))
    norms = torch.tensor([1.0, 0.5, 4.0, 1e-6, 1e6])
    result = balanced(LossTerms(given, terms), lambda losses: norms)
    low, high = ADAPTIVE_RANGE
    assert (low, high) == (0.01, 10)
    assert [float(w) for w in result.weights.values()] == pytest.approx([2, 2, 0.75, high, low])


@pytest.mark.parametrize(
    ("norms", "expected"),
    [([0.0, 1.0], [0.01, 0.01]), ([1.0, 0.0], [1, 10]), ([0.0, 0.0], [0.01, 0.01])],
)
def test_a_term_without_gradient_leaves_the_weights_finite(norms, expected):
    result = LossTerms({"a": 1.0, "b": 1.0}, {"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
    weights = balanced(result, lambda losses: torch.tensor(norms)).weights
    assert [float(weight) for weight in weights.values()] == pytest.approx(expected)


@both_networks
def test_scot_is_a_configuration_and_runs(name):
    (config,) = compose(["experiment=tiny", "objective=scot"])
    objective_config = config.objective
    assert isinstance(objective_config, SummedConfig)
    assert objective_config.weights == "adaptive"
    assert objective_config.velocity_mode == "straight"
    engine = engine_of(name)
    objective = build_objective(objective_config, 0, gradient_norms=engine.gradient_norms)
    result = objective.loss(flow_batch(FLOW), engine.student, engine.target, 0)
    assert set(result.terms) == {"velocity", "consistency", "flow_matching"}
    assert all(0.01 <= float(w) <= 10 for w in result.weights.values())
    engine.backward(result.total, last=True)
    assert 0 < engine.step(0, 1e-3) < float("inf")
