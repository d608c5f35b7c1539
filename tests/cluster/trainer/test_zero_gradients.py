"""Gradients at every ZeRO stage are those of one process, whatever else a step asks of autograd.

DeepSpeed's hooks neither change what is taken beside the step's own pass back nor feel it.
"""

import pytest
import torch

from distill.config import ConfigError, ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.networks.build import build_network
from distill.networks.layers import compiled
from distill.testing import NETWORKS, run_ranks

IMAGE = ImageSpec(1, 4, 3)
CPU = torch.device("cpu")
MICRO_BATCHES = 2
# What a step asks of autograd beside its own pass back, by mode.
ASKED = {
    "plain": (),
    "norms": ("norms",),
    "target": ("target",),
    "jvp": ("jvp",),
    "recomputed": ("target",),
    "compiled": ("norms", "target", "jvp"),
}
MODES = [mode for mode in ASKED if mode != "compiled"]  # that takes minutes
CASES = [(stage, name, mode) for stage in range(4) for name in NETWORKS for mode in MODES]


def config_of(stage: int, mode: str, world_size: int = 2) -> TrainConfig:
    return TrainConfig(
        batch_size=8,
        micro_batch=4 // world_size,
        zero_stage=stage,
        grad_clip=0.0,
        activation_checkpointing=mode == "recomputed",
        compile=mode == "compiled",
    )


def network(name: str):
    """Every weight moved, so that no gradient is 0 by the start's symmetry."""
    built = build_network(NETWORKS[name], IMAGE, seed=3)
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
    """Two scalars of two evaluations."""
    u, v = student(x, t, s, label), student(-x, t, t, label)
    return [(u * v).mean(), (u - x).abs().mean()]


def target_loss(engine, x, t, s, label) -> torch.Tensor:
    """The student's jump, carried on by the average, against one without gradient at all."""
    landing = x + 0.4 * engine.student(x, t, s, label)
    with torch.no_grad():
        goal = engine.evaluation(x, t, s, label) + engine.student(x, t, t, label)
    return (engine.target(landing, s, s, label) - goal).square().mean()


def slope_loss(student, x, t, s, label) -> torch.Tensor:
    """A loss on du/ds, by forward mode without gradient."""

    def at(s):
        return student(x, t, s, label)

    with torch.no_grad():
        slope = torch.func.jvp(at, (s,), (torch.ones_like(s),))[1]
    return (student(x, t, s, label) - slope).square().mean()


def run_step(engine, world_size: int, mode: str) -> tuple[list[torch.Tensor], float, dict]:
    """Gradient norms of each micro-batch, the step's norm, and Adam's first moments after it."""
    norms = []
    for micro in range(MICRO_BATCHES):
        batch = inputs(engine.rank, world_size, micro)
        found = losses(engine.student, *batch)
        if "norms" in ASKED[mode]:
            norms.append(engine.gradient_norms(found))
            assert engine.has_finite_gradient(found[0])
        if "target" in ASKED[mode]:
            found.append(target_loss(engine, *batch))
        if "jvp" in ASKED[mode]:
            found.append(slope_loss(engine.student, *batch))
        engine.backward(torch.stack(found).sum(), last=micro == MICRO_BATCHES - 1)
    norm = engine.step(0, 1e-3)
    moments = {(f.name, f.start): f.data for f in engine.fragments() if f.kind == "exp_avg"}
    return norms, norm, moments


def steps_rank(rank: int, world_size: int, cases: list):
    """A first step of every case, each with an engine of its own."""
    from cluster.trainer.zero import DeepSpeedEngine

    found = []
    for stage, name, mode in cases:
        engine = DeepSpeedEngine(network(name), config_of(stage, mode, world_size), CPU)
        found.append(run_step(engine, world_size, mode))
    return found


def single_step(name: str, mode: str):
    """The reference: no DeepSpeed, no recomputation, no torch.compile."""
    return run_step(TorchEngine(network(name), config_of(1, "plain", 1), CPU), 1, mode)


def assert_same_moments(found: list[dict], expected: dict) -> None:
    """Adam's first moments after one step, (1 - beta) times the gradient: to 1e-4, or 1e-7."""
    held = 0
    for moments in found:
        for (name, start), value in moments.items():
            whole = expected[name, 0]
            held += len(value)
            torch.testing.assert_close(
                value, whole[start : start + len(value)], rtol=1e-4, atol=1e-7, msg=name
            )
    assert held == sum(len(whole) for whole in expected.values())


def assert_same_step(ranks: list, expected: tuple) -> None:
    """Norms to 1e-4, gradients as `assert_same_moments` says."""
    for norms, norm, _ in ranks:
        assert norm == pytest.approx(expected[1], rel=1e-4)
        for ours, theirs in zip(norms, expected[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert_same_moments([moments for *_, moments in ranks], expected[2])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    """What both ranks found in every case: one start of two processes for all of them."""
    found = run_ranks(steps_rank, 2, tmp_path_factory.mktemp("two") / "ranks", CASES)
    return dict(zip(CASES, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_gradients_of_a_step_are_those_of_a_single_process(two_ranks, case):
    """With accumulation, gradients asked for between the passes, averages, losses on du/ds."""
    _, name, mode = case
    assert_same_step(two_ranks[case], single_step(name, mode))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks_with_one_sample_each_are_a_single_process_too(tmp_path):
    found = run_ranks(steps_rank, 4, tmp_path / "ranks", CASES)
    for (_, name, mode), ranks in zip(CASES, zip(*found, strict=True), strict=True):
        assert_same_step(list(ranks), single_step(name, mode))


COMPILED = [(stage, name, "compiled") for stage, name in ((0, "dit"), (1, "unet"), (2, "dit"))]


def compiled_rank(rank: int, world_size: int) -> tuple[list, list[int]]:
    """The steps of `COMPILED`, and numbers of graphs before and after a larger batch."""
    from torch._dynamo.utils import counters

    from cluster.trainer.zero import DeepSpeedEngine

    graphs, steps = [], steps_rank(rank, world_size, COMPILED)
    graphs.append(counters["stats"]["unique_graphs"])
    engine = DeepSpeedEngine(network("dit"), config_of(1, "compiled", world_size), CPU)
    engine.student(*[torch.cat([value, value]) for value in inputs(rank, world_size, 0)])
    graphs.append(counters["stats"]["unique_graphs"])
    return steps, graphs


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compiled_step_is_a_plain_one(tmp_path):
    """Several passes back, averages and a forward-mode derivative; after that it still compiles."""
    found = run_ranks(compiled_rank, 2, tmp_path / "ranks")
    for case, ranks in zip(COMPILED, zip(*[steps for steps, _ in found], strict=True), strict=True):
        assert_same_step(list(ranks), single_step(*case[1:]))
    assert all(0 < before < after for _, (before, after) in found)


def test_a_network_is_not_compiled_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler on this node; install"):
        compiled(network("dit"))


@pytest.mark.parametrize("name", NETWORKS)
def test_asking_for_gradients_changes_no_step(name):
    _, norm, plain = single_step(name, "plain")
    norms, same, asked = single_step(name, "norms")
    assert norm == same and all(bool((row > 1e-3).all()) for row in norms)
    assert all(torch.equal(plain[key], asked[key]) for key in plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_computed_again_change_no_bit_of_a_gradient(name):
    plain = run_step(TorchEngine(network(name), config_of(1, "plain", 1), CPU), 1, "target")
    again = run_step(TorchEngine(network(name), config_of(1, "recomputed", 1), CPU), 1, "target")
    assert plain[1] == again[1]
    assert all(torch.equal(plain[2][key], again[2][key]) for key in plain[2])


def test_gradient_norms_are_those_of_the_last_layer():
    built, batch = network("dit"), inputs(0, 1, 0)
    engine = TorchEngine(built, config_of(1, "norms", 1), CPU)
    found = losses(engine.student, *batch)
    norms = engine.gradient_norms(found)
    found[0].backward()
    torch.testing.assert_close(norms[0], built.last_layer.grad.norm())
