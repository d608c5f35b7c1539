"""The baselines: where each has no loss, and what it reads."""

import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.flow import paths
from distill.flow.curve import curve_through
from distill.objectives import base, config as settings, derivatives
from distill.objectives.build import build_objective
from distill.objectives.distances import l2, pseudo_huber, squared_gap
from distill.objectives.meanflow import draw_jump
from distill.objectives.progressive import Progressive
from distill.objectives.reflow import u_shaped
from distill.testing import NETWORKS, GaussianFlow, StraightFlow, flow_batch, random_network

IMAGE = ImageSpec(1, 4, 3)
MEAN = torch.full(IMAGE.shape, 0.5, dtype=torch.float64)
FLOW, STRAIGHT = GaussianFlow(MEAN, 0.3), StraightFlow(MEAN, 0.3)


def loss(config, batch, student, target=None, step: int = 3) -> float:
    objective = build_objective(config, 0)
    return float(objective.loss(batch, student, target or student, step).total.detach())


# -----------------------------------------------------------------------------------------------
# Exact maps


@pytest.mark.parametrize(
    "config", [settings.ConsistencyConfig(), settings.EndpointConfig()], ids=["ctm", "endpoint"]
)
def test_the_exact_flow_map_has_no_loss(config):
    assert loss(config, flow_batch(FLOW), FLOW.student) < 1e-20


@pytest.mark.parametrize(
    "config",
    [
        settings.EndpointConfig(),
        settings.ReflowConfig(),
        settings.ReflowConfig(times="u_shaped"),
        settings.ConsistencyConfig(),
        settings.MeanFlowConfig(derivative="jvp"),
        settings.MeanFlowConfig(derivative="finite_difference"),
        settings.MeanFlowConfig(path="curve", adaptive_power=0.5, p_diagonal=0.0),
        settings.LagrangianConfig(derivative="jvp"),
        settings.LagrangianConfig(derivative="finite_difference"),
        settings.ShortcutConfig(),
        settings.ShortcutConfig(path="curve"),
        settings.ProgressiveConfig(),
    ],
    ids=str,
)
def test_on_straight_paths_all_agree_on_the_straight_map(config):
    assert loss(config, flow_batch(STRAIGHT), STRAIGHT.student) < 1e-12


@pytest.mark.parametrize(
    "config",
    [
        settings.MeanFlowConfig(path="curve", adaptive_power=0.0, derivative="jvp"),
        settings.LagrangianConfig(derivative="jvp"),
        settings.LagrangianConfig(derivative="finite_difference"),
        settings.ProgressiveConfig(jumps=64),
    ],
    ids=str,
)
def test_on_the_teachers_curve_its_own_map_loses_what_the_curve_misses(config):
    """Slopes of the curve are of third order in the stored step: squared, 64 times less of half."""
    at_grid = [
        loss(config, flow_batch(FLOW, grid=grid, count=256), FLOW.student, step=0)
        for grid in (8, 16)
    ]
    assert at_grid[0] < 1e-4
    assert at_grid[1] < at_grid[0] / 32


@pytest.mark.parametrize(
    "config", [settings.ReflowConfig(), settings.MeanFlowConfig()], ids=["reflow", "meanflow"]
)
def test_on_curved_paths_the_next_rectified_flow_is_another_model(config):
    """Both learn the straight pairs of the teacher, so the teacher's own map has a loss."""
    assert loss(config, flow_batch(FLOW), FLOW.student) > 1e-3


def test_reflow_of_gaussian_pairs_has_the_straight_flow_as_its_answer():
    """The pairs x_1 = m + c x_0 of the curved Gaussian flow are those of the straight one."""
    assert loss(settings.ReflowConfig(), flow_batch(FLOW), STRAIGHT.student) < 1e-24
    assert (
        loss(settings.MeanFlowConfig(derivative="jvp"), flow_batch(FLOW), STRAIGHT.student) < 1e-12
    )


def test_consistency_is_blind_to_the_end_where_its_target_is():
    """A student that never moves agrees with itself only if the teacher does not move either."""

    def still(x, t, s, label):
        return 0 * x

    assert loss(settings.ConsistencyConfig(), flow_batch(FLOW), still) > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_consistency_target_is_the_average_and_not_the_student(name):
    student, batch = random_network(name, IMAGE), flow_batch(FLOW)
    ours, other = (
        loss(settings.ConsistencyConfig(), batch, student, target)
        for target in (student, random_network(name, IMAGE, seed=1))
    )
    assert abs(ours - other) > 1e-3


# -----------------------------------------------------------------------------------------------
# MeanFlow


def written_out(config, student, batch, step) -> tuple[torch.Tensor, torch.Tensor]:
    """D of its words, by forward mode, and the same with the weight."""
    t, s = draw_jump(config, 0, step, batch)
    if config.path == "straight":
        x_0, x_1 = batch.noise, batch.best[:, -1]
        x, v = paths.interpolate(x_0, x_1, t), x_1 - x_0
    else:
        x, v = curve_through(batch.best, batch.times).at(t)
    with torch.no_grad():
        du_dt = torch.func.jvp(
            lambda x, t: student(x, t, s, batch.condition), (x, t), (v, torch.ones_like(t))
        )[1]
        goal = v + (s - t)[:, None, None, None] * du_dt
    u = student(x, t, s, batch.condition)
    size = squared_gap(u.detach(), goal) + config.adaptive_floor
    return l2(u, goal).mean(), (l2(u, goal) / size**config.adaptive_power).mean()


@pytest.mark.parametrize("path", ["straight", "curve"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_meanflow_shows_its_distance_and_pulls_by_the_weighted_one(power, path):
    network, batch = random_network("dit", IMAGE), flow_batch(FLOW)
    config = settings.MeanFlowConfig(
        path=path, adaptive_power=power, adaptive_floor=0.1, derivative="jvp", p_diagonal=0.3
    )
    found = build_objective(config, 0).loss(batch, network, network, 2).total
    shown, weighted = written_out(config, network, batch, 2)
    torch.testing.assert_close(found, shown)
    gradients = [torch.autograd.grad(one, [network.last_layer])[0] for one in (found, weighted)]
    torch.testing.assert_close(*gradients)


def test_the_times_of_version_0_2_are_kept():
    """t uniform and s uniform after it: the same draws as ever."""
    config = settings.MeanFlowConfig(times="after", p_diagonal=0.25)
    batch = flow_batch(FLOW)
    one, other, third = (
        base.draw(5, f"meanflow/{name}", 7, batch) for name in ("t", "s", "diagonal")
    )
    t, s = draw_jump(config, 5, 7, batch)
    assert torch.equal(t, one)
    assert torch.equal(s, torch.where(third < 0.25, one, one + (1 - one) * other))


def test_logit_normal_times_are_the_papers_with_time_reversed():
    """Their lognorm(-0.4, 1.0), where 1 is noise: of all times of jumps, in the noise 1 - t."""
    batch = flow_batch(GaussianFlow(torch.zeros(1).double(), 0.5), count=20_000)
    t, s = draw_jump(settings.MeanFlowConfig(p_diagonal=0.0), 0, 1, batch)
    assert bool((t <= s).all() and (t >= 0).all() and (s <= 1).all())
    theirs = torch.logit(1 - torch.cat([t, s]))
    assert float(theirs.mean()) == pytest.approx(-0.4, abs=0.03)
    assert float(theirs.std()) == pytest.approx(1.0, abs=0.03)
    uniform = draw_jump(settings.MeanFlowConfig(times="uniform", p_diagonal=0.0), 0, 1, batch)
    both = torch.cat(uniform)
    assert float(both.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(both.std()) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("p_diagonal", [0.0, 0.5, 1.0])
def test_meanflow_takes_the_diagonal_with_its_chance(p_diagonal):
    batch, seen = flow_batch(FLOW, count=2000), []

    def student(x, t, s, label):
        seen.append((t == s).double().mean())
        return x

    loss(settings.MeanFlowConfig(p_diagonal=p_diagonal), batch, student)
    assert float(seen[0]) == pytest.approx(p_diagonal, abs=0.05)


# -----------------------------------------------------------------------------------------------
# Lagrangian


def test_the_difference_of_jumps_is_the_slope_in_s_up_to_first_order(monkeypatch):
    """At s = t it is u itself, and the goal the slope of the curve."""
    network, seen = random_network("dit", IMAGE), {}

    def student(x, t, s, label):
        seen.update(x=x[:16], t=t[:16], s=s[:16], label=label[:16])
        return network(x, t, s, label)

    def slope_of(h):
        found = []
        monkeypatch.setattr(derivatives, "FINITE_STEP", h)
        objective = build_objective(settings.LagrangianConfig(share_diagonal=0.25), 0)
        monkeypatch.setattr(
            objective,
            "distances",
            base.Distances(l2, lambda a, b: found.extend([a, b]) or l2(a, b)),
        )
        objective.loss(flow_batch(FLOW), student, student, 3)
        return found

    small, goal = slope_of(2e-4)
    x, t, s, label = seen["x"], seen["t"], seen["s"], seen["label"]
    assert 0 < int((s == t).sum()) < 16
    h = 1e-5
    rate = (network(x, t, s + h, label) - network(x, t, s - h, label)) / (2 * h)
    gap = (s - t)[:, None, None, None]
    exact = network(x, t, s, label) + gap * rate
    assert float(((small - exact).norm() / exact.norm()).detach()) < 1e-2
    curve = curve_through(flow_batch(FLOW).best, flow_batch(FLOW).times)
    torch.testing.assert_close(goal, curve.at(s)[1], atol=1e-2, rtol=1e-2)
    errors = [float((slope_of(h)[0] - exact).norm().detach()) for h in (1e-3, 5e-4)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("derivative", ["jvp", "finite_difference"])
def test_a_rank_whose_samples_are_all_flow_matching_calls_as_often_as_the_others(derivative):
    whole, calls = flow_batch(FLOW, count=8), []

    def student(x, t, s, label):
        calls.append(len(x))
        return 0 * x + 0 * (t + s)[:, None, None, None]

    objective = build_objective(
        settings.LagrangianConfig(share_diagonal=0.5, derivative=derivative), 0
    )
    for part in whole.split(8):
        objective.loss(part, student, student, 0)
    assert set(calls) == ({2} if derivative == "finite_difference" else {1})


# -----------------------------------------------------------------------------------------------
# Shortcut


@pytest.mark.parametrize("shortest", [2, 4, 32])
def test_a_shortcut_is_the_mean_of_two_half_jumps_of_the_average(shortest):
    """Of the shortest kind, of two velocities."""
    batch, asked, landed = flow_batch(FLOW, count=64), [], []
    network = random_network("dit", IMAGE, seed=1)

    def target(x, t, s, label):
        asked.append((x, t, s))
        return network(x, t, s, label).detach()

    def student(x, t, s, label):
        landed.append((x, t, s))
        return network(x, t, s, label)

    config = settings.ShortcutConfig(share_diagonal=0.0, shortest=shortest)
    found = build_objective(config, 0).loss(batch, student, target, 0)
    ((x, t, s),) = landed
    (x_1, t_1, s_1), (x_2, t_2, s_2) = asked
    half = (s - t) / 2
    levels = (-half.log2()).round()
    assert torch.equal(half, 0.5**levels)
    assert {int(level) for level in levels} == set(range(1, shortest.bit_length()))
    assert bool((((t / (2 * half)) % 1) == 0).all() and (s <= 1).all())
    is_shortest = half == 1 / shortest
    for begin, end, at in ((t_1, s_1, t), (t_2, s_2, t + half)):
        assert torch.equal(begin, at)
        assert torch.equal(end - begin, torch.where(is_shortest, 0, half))
    torch.testing.assert_close(x_1, x)
    first, second = (network(*call, batch.condition) for call in asked)
    torch.testing.assert_close(x_2, x + half[:, None, None, None] * first)
    expected = l2(network(x, t, s, batch.condition), (first + second) / 2).mean()
    torch.testing.assert_close(found.total, expected)


def test_flow_matching_alone_asks_no_average():
    def forbidden(x, t, s, label):
        raise AssertionError("called")

    config = settings.ShortcutConfig(share_diagonal=1.0, path="curve")
    result = build_objective(config, 0).loss(flow_batch(FLOW), FLOW.student, forbidden, 0)
    assert set(result.terms) == {"flow_matching"}


# -----------------------------------------------------------------------------------------------
# Progressive


def test_jumps_halve_from_phase_to_phase_and_stay_one():
    objective = build_objective(settings.ProgressiveConfig(jumps=4), 0, max_steps=9)
    assert isinstance(objective, Progressive)
    assert [objective.jumps(step) for step in range(11)] == [4, 4, 4, 2, 2, 2, 1, 1, 1, 1, 1]
    assert build_objective(settings.ProgressiveConfig(jumps=1), 0, max_steps=9).jumps(0) == 1


def test_progressive_jumps_are_those_of_their_phase_and_end_where_the_teacher_does():
    objective, batch = build_objective(settings.ProgressiveConfig(), 0, max_steps=3), None
    for step, count in enumerate((4, 2, 1)):
        batch, seen = flow_batch(FLOW, count=64), []

        def student(x, t, s, label, seen=seen):
            seen.append((t, s))
            return FLOW.student(x, t, s, label)

        assert float(objective.loss(batch, student, student, step).total) < 1e-20
        ((t, s),) = seen
        assert set(t.tolist()) == {k / count for k in range(count)}
        torch.testing.assert_close(s - t, torch.full_like(t, 1 / count))


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (settings.ProgressiveConfig, {"jumps": 3}, "jumps=3 must be a power of 2, at least 1"),
        (settings.ShortcutConfig, {"shortest": 1}, "shortest=1 must be a power of 2, at least 2"),
        (settings.ShortcutConfig, {"share_diagonal": 1.5}, "share_diagonal=1.5 must be between"),
        (settings.LagrangianConfig, {"share_diagonal": -0.5}, "share_diagonal=-0.5 must be"),
        (settings.MeanFlowConfig, {"adaptive_power": -1.0}, "adaptive_power=-1.0 must not be"),
        (settings.MeanFlowConfig, {"adaptive_floor": 0.0}, "adaptive_floor=0.0 must be above 0"),
    ],
)
def test_what_cannot_work_is_said(kind, wrong, words):
    with pytest.raises(ConfigError, match=f"objective.{words}"):
        kind(**wrong)


# -----------------------------------------------------------------------------------------------
# Draws and distances


def test_drawn_indices_stay_in_range_and_reach_both_ends():
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert base.draw_index(u, 2, 4).tolist() == [2, 3, 4]
    assert base.draw_index(u, 4, 4).tolist() == [4, 4, 4]


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
