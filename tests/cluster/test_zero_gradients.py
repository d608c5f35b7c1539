"""Gradients taken beside the step's own: DeepSpeed's hooks neither change them nor feel them."""

import pytest
import torch

from distill.config import DiTConfig, ImageSpec, TrainConfig
from distill.engine import TorchEngine
from distill.networks import build_network
from distill.testing import run_ranks

IMAGE = ImageSpec(1, 4, 3)
NETWORK = DiTConfig(patch_size=2, width=16, depth=2, num_heads=2)
CPU = torch.device("cpu")
MICRO_BATCHES = 2
MODES = ("plain", "norms", "jvp", "double_backward")


def config_of(stage: int) -> TrainConfig:
    return TrainConfig(batch_size=8, micro_batch=2, zero_stage=stage, grad_clip=0.0)


def network():
    """Every weight moved, so that no gradient is 0 by the start's symmetry."""
    built = build_network(NETWORK, IMAGE, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


def inputs(rank: int, world_size: int, micro: int):
    """(x, t, s, label) of micro-batch `micro`: samples rank, rank + world_size, .. of 4."""
    generator = torch.Generator().manual_seed(10 + micro)
    x = torch.randn(4, *IMAGE.shape, generator=generator)
    t = 0.5 * torch.rand(4, generator=generator)
    whole = (x, t, t + 0.4, torch.tensor([0, 1, 2, -1]))
    return tuple(value[rank::world_size] for value in whole)


def losses(student, x, t, s, label) -> list[torch.Tensor]:
    """Two scalars of one graph."""
    u = student(x, t, s, label)
    return [u.square().mean(), (u - x).abs().mean()]


def slope_loss(student, x, t, s, label, mode: str) -> torch.Tensor:
    """A loss on du/ds: forward mode without gradient, or reverse over a double backward."""
    if mode == "jvp":

        def at(s):
            return student(x, t, s, label)

        with torch.no_grad():
            slope = torch.func.jvp(at, (s,), (torch.ones_like(s),))[1]
        return (student(x, t, s, label) - slope).square().mean()
    s = s.detach().requires_grad_(True)
    u = student(x, t, s, label)
    # The gradient of a sum over samples by s is each sample's own, along x.
    (slope,) = torch.autograd.grad((u * x).sum(), s, create_graph=True)
    return (u - x).square().mean() + slope.square().mean()


def run_step(engine, world_size: int, mode: str) -> tuple[list[torch.Tensor], float, dict]:
    """Gradient norms of each micro-batch, the step's norm, and Adam's first moments after it."""
    norms = []
    for micro in range(MICRO_BATCHES):
        batch = inputs(engine.rank, world_size, micro)
        found = losses(engine.student, *batch)
        if mode == "norms":
            norms.append(engine.gradient_norms(found))
            assert engine.has_finite_gradient(found[0])
        if mode in ("jvp", "double_backward"):
            found.append(slope_loss(engine.student, *batch, mode))
        engine.backward(torch.stack(found).sum(), last=micro == MICRO_BATCHES - 1)
    norm = engine.step(0, 1e-3)
    moments = {(f.name, f.start): f.data for f in engine.fragments() if f.kind == "exp_avg"}
    return norms, norm, moments


def steps_rank(rank: int, world_size: int, stage: int):
    """A first step in every mode, each with an engine of its own."""
    from cluster.zero import DeepSpeedEngine

    return {
        mode: run_step(DeepSpeedEngine(network(), config_of(stage), CPU), world_size, mode)
        for mode in MODES
    }


def single_step(mode: str):
    return run_step(TorchEngine(network(), config_of(1), CPU), 1, mode)


def assert_same_moments(found: list[dict], expected: dict) -> None:
    """Adam's first moments after one step are (1 - beta) times the gradient."""
    held = 0
    for moments in found:
        for (name, start), value in moments.items():
            whole = expected[name, 0]
            held += len(value)
            torch.testing.assert_close(
                value, whole[start : start + len(value)], rtol=1e-4, atol=1e-7, msg=name
            )
    assert held == sum(len(whole) for whole in expected.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradients_of_a_step_are_those_of_a_single_process(tmp_path, stage):
    """With accumulation, gradients asked for between the passes, and losses on du/ds."""
    found = run_ranks(steps_rank, 2, tmp_path / "ranks", stage)
    for mode in MODES:
        expected_norms, expected_norm, expected = single_step(mode)
        for norms, norm, _ in (rank[mode] for rank in found):
            assert norm == pytest.approx(expected_norm, rel=1e-4), mode
            for ours, theirs in zip(norms, expected_norms, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7, msg=mode)
        assert_same_moments([rank[mode][2] for rank in found], expected)


def test_asking_for_gradients_changes_no_step():
    _, norm, plain = single_step("plain")
    norms, same, asked = single_step("norms")
    assert norm == same and all(bool((row > 1e-3).all()) for row in norms)
    assert all(torch.equal(plain[key], asked[key]) for key in plain)


def test_gradient_norms_are_those_of_the_last_layer():
    built, batch = network(), inputs(0, 1, 0)
    engine = TorchEngine(built, config_of(1), CPU)
    found = losses(engine.student, *batch)
    norms = engine.gradient_norms(found)
    found[0].backward()
    torch.testing.assert_close(norms[0], built.last_layer.grad.norm())
