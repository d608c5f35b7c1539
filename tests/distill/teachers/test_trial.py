"""A teacher in another convention is refused by its own samples, and told which one it is of."""

import argparse
import math
from dataclasses import replace

import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.teachers.build import build_teacher, readings
from distill.teachers.config import AnalyticConfig, CheckpointConfig, NativeConfig
from distill.teachers.conventions import Convention, Converted, every, linear_betas
from distill.teachers.trial import try_teacher, try_velocity
from distill.testing import GaussianFlow, tiny_teacher

MEAN, STD = 0.5, 0.3
IMAGE = ImageSpec(1, 4, 0)
BETAS = linear_betas()
KEPT = torch.cumprod(1 - torch.tensor(BETAS, dtype=torch.float64), 0)


def coefficients(convention, tau):
    """alpha, sigma and their slopes of a path at its own time, written out, without `_Path`."""
    u, half_pi = torch.tensor(tau, dtype=torch.float64), math.pi / 2
    match convention.path_type:
        case "linear":
            return u, 1 - u, torch.ones_like(u), -torch.ones_like(u)
        case "gvp":
            alpha, sigma = torch.sin(u * half_pi), torch.cos(u * half_pi)
            return alpha, sigma, half_pi * sigma, -half_pi * alpha
        case "vp":
            alpha = torch.exp(-0.25 * (1 - u) ** 2 * 19.9 - 0.5 * (1 - u) * 0.1)
            slope = alpha * (0.5 * (1 - u) * 19.9 + 0.5 * 0.1)
            sigma = (1 - alpha**2).sqrt()
            return alpha, sigma, slope, -alpha * slope / sigma
    kept = KEPT[min(max(round(tau), 0), 999)]
    return kept.sqrt(), (1 - kept).sqrt(), None, None


def exact_model(convention):
    """What a perfect network of a convention predicts for data N(MEAN, STD^2), at its own times."""

    def model(y, tau, label):
        time = float(tau[0])
        is_reversed = convention.time == "data_to_noise" and convention.path_type != "ddpm"
        a, s, da, ds = coefficients(convention, 1 - time if is_reversed else time)
        s = s.clamp_min(1e-6)
        data = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (y - a * MEAN)
        noise = (y - a * data) / s
        made = {
            "noise": noise,
            "data": data,
            "score": -noise / s,
            "v": a * noise - s * data,
            "velocity": None
            if da is None
            else (-1 if is_reversed else 1) * (da * data + ds * noise),
        }
        return made[convention.prediction].to(y.dtype)

    return model


EVERY = list(every())


@pytest.mark.parametrize("convention", EVERY, ids=lambda c: c.words)
def test_every_convention_is_converted_exactly(convention):
    velocity = Converted(exact_model(convention), convention)
    flow = GaussianFlow(torch.full((1, 1, 4, 4), MEAN, dtype=torch.float64), STD)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([-1, -1])
    times = [0.1, 0.35, 0.5, 0.9]
    if convention.path_type == "ddpm":  # where the table has a step
        n = [
            float(KEPT[k].sqrt()) / float(KEPT[k].sqrt() + (1 - KEPT[k]).sqrt()) for k in (700, 300)
        ]
        times = n
    for time in times:
        t = torch.full((2,), time, dtype=torch.float64)
        torch.testing.assert_close(velocity(x, t, label), flow.velocity(x, t), rtol=1e-5, atol=1e-6)


def test_our_own_velocity_is_passed_on_bit_for_bit():
    model = exact_model(Convention())
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 0.3])
    label = torch.tensor([-1, -1])
    assert torch.equal(Converted(model, Convention())(x, t, label), model(x, t, label))


# -----------------------------------------------------------------------------------------------
# The trial


@pytest.mark.parametrize("convention", EVERY, ids=lambda c: c.words)
def test_own_samples_tell_ours_from_every_other_convention(convention):
    """Each exact model, taken for a velocity of ours: only ours passes."""
    trial = try_velocity(exact_model(convention), IMAGE, "cpu", 0, 64)
    assert trial.is_passed == (convention == Convention()), trial.words
    if convention == Convention():
        assert 0.9 < trial.slope_low < trial.slope_high < 1.1
        assert 0.5 < trial.size < 0.65


def test_presets_pass_and_nothing_in_particular_does_not():
    for path in ("ring8", "mixture64"):
        teacher = build_teacher(AnalyticConfig(path=path), "cpu")
        assert try_velocity(teacher.velocity, teacher.image, "cpu", 0, 64).is_passed
    teacher = tiny_teacher()
    assert try_velocity(teacher.velocity, teacher.image, "cpu", 0, 64).is_passed
    zero = try_velocity(lambda x, t, label: 0 * x, IMAGE, "cpu", 0, 8)
    assert zero.error == 1 and not zero.is_passed
    assert not try_velocity(lambda x, t, label: torch.sin(9 * x), IMAGE, "cpu", 0, 8).is_passed


DIT = DiTConfig(patch_size=2, width=32, depth=1, num_heads=2)
TINY = ImageSpec(1, 4, 2)


def trained(target, steps=300):
    """Weights of a tiny transformer after a training on N(MEAN, 0.1^2) towards `target`."""
    network = build_network(DIT, TINY)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        data = MEAN + 0.1 * torch.randn(64, 1, 4, 4, generator=draw)
        noise, u = torch.randn(64, 1, 4, 4, generator=draw), torch.rand(64, generator=draw)
        x, t, goal = target(data, noise, u.view(-1, 1, 1, 1))
        label = torch.randint(-1, 2, (64,), generator=draw)
        loss = (network(x, t, t, label) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = network.state_dict()
    return {name: v for name, v in state.items() if not name.startswith("s_embedder")}


def repa(data, noise, u):
    return (1 - u) * data + u * noise, u.flatten(), noise - data


def gvp(data, noise, u):
    alpha, sigma = torch.sin(u * math.pi / 2), torch.cos(u * math.pi / 2)
    slope = math.pi / 2 * (sigma * data - alpha * noise)
    return alpha * data + sigma * noise, u.flatten(), slope


REPA = argparse.Namespace(proj_coeff=0.5, prediction="v")
GVP = argparse.Namespace(path_type="GVP", prediction="velocity")


@pytest.mark.parametrize(
    ("target", "fits", "args"),
    [
        (repa, {"time": "data_to_noise"}, REPA),
        (gvp, {"path_type": "gvp", "prediction": "velocity"}, GVP),
    ],
    ids=["repa", "gvp"],
)
def test_a_trained_file_in_another_convention_is_refused_with_the_one_that_fits(
    tmp_path, target, fits, args
):
    """And under the settings of that sentence, or where the file says so, its samples are right."""
    config, state = CheckpointConfig(path=str(tmp_path / "c.pt"), num_heads=2), trained(target)
    torch.save(state, config.path)
    wrong = build_teacher(config, "cpu")
    with pytest.raises(ConfigError, match=r"teacher\.a is no velocity field") as refused:
        try_teacher("a", wrong, config, "cpu", 0)
    for key, value in fits.items():
        assert f"teacher.{key}={value}" in str(refused.value)
    assert not try_teacher("a", wrong, replace(config, trial=False), "cpu", 0).is_passed
    told = build_teacher(replace(config, **fits), "cpu")
    torch.save({"ema": state, "args": args}, config.path)
    for right in (told, build_teacher(config, "cpu")):
        trial = try_teacher("a", right, config, "cpu", 0)
        assert trial.is_passed and abs(trial.size - 0.51) < 0.06


def test_own_teachers_are_not_refused(tmp_path):
    zero = build_teacher(AnalyticConfig(path="ring8"), "cpu")
    zero.velocity = lambda x, t, label: 0 * x
    assert not try_teacher("a", zero, NativeConfig(path="x"), "cpu", 0).is_passed


def test_readings_of_a_file_are_of_its_own_network(tmp_path):
    state = build_network(DIT, TINY).state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(proj_coeff=0.5)}, tmp_path / "c.pt")
    config = CheckpointConfig(path=str(tmp_path / "c.pt"), num_heads=2)
    x, t, label = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 0.3]), torch.tensor([0, 1])
    found = dict(readings(config, "cpu"))
    right = build_teacher(config, "cpu").velocity(x, t, label)
    words = Convention(time="data_to_noise").words
    torch.testing.assert_close(found[words](x, t, label), right, rtol=1e-4, atol=1e-6)
