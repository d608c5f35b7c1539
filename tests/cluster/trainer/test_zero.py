"""ZeRO is the single process, on any number of ranks: steps, averages, precision, offload."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import (
    CPU,
    EVERY_TERM,
    OFFLOADED,
    PLACES,
    allow_fp16,
    assert_same_run,
    assert_same_state,
    config_of,
    fit,
    manifest,
    moved_network,
    read_state,
    single_engine,
    windows,
    zero_engine,
)

from distill.checkpoint.manifest import latest_verified
from distill.config import ConfigError, TrainConfig
from distill.objectives.build import build_objective
from distill.objectives.config import OBJECTIVES, GuidesConfig, MeanFlowConfig
from distill.run.files import RunDir
from distill.testing import run_ranks
from distill.training.loop import TrainingError

FEWER = [place for place in PLACES if place not in ((1, "optimizer"), (3, "optimizer"))]


class SteepOnRankOne:
    """The usual loss, but at step 2 the gradient of one sample's zero term is not a number."""

    def __init__(self) -> None:
        self.inner = build_objective(EVERY_TERM, 0)

    def loss(self, batch, student, target, step):
        result = self.inner.loss(batch, student, target, step)
        zero = 0 * result.terms["output"]
        breaks = step == 2 and 5 in batch.positions
        result.terms["steep"] = zero.sqrt() if breaks else zero
        result.weights["steep"] = 1.0
        return result


def steep_rank(rank: int, world_size: int, root: str, settings: dict) -> list[str]:
    """What each failing run says; then it goes on from the checkpoint, on the same engine."""
    allow_fp16()
    said = []
    for name, more in settings.items():
        config, folder = config_of(**more), f"{root}/{name}"
        engine = zero_engine(config)
        try:
            fit(engine, folder, config, SteepOnRankOne())
        except TrainingError as error:
            said.append(str(error))
        assert latest_verified(RunDir(Path(folder)).checkpoints)[0] == 2
        assert fit(engine, folder, config) == 4
    return said


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Four steps in one process: the reference."""
    root = tmp_path_factory.mktemp("single")
    config = config_of()
    fit(single_engine(config), root, config)
    return root


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_weights_change(
    tmp_path, single
):
    """The state before the step is saved, so the run that goes on is the healthy one."""
    settings = {
        "0": {"save_every": 3, "zero_stage": 0},
        "1": {"save_every": 3},
        "2": {"save_every": 3, "zero_stage": 2, "micro_batch": 2},
        "3": {"save_every": 3, "zero_stage": 3},
        "bf16": {"save_every": 3, "precision": "bf16"},
        "fp16": {"save_every": 3, "precision": "fp16"},
        "async": {"save_every": 3, "save_async": True},
        "2 off": {"save_every": 3, "offload": "optimizer", "zero_stage": 2, "micro_batch": 2},
        "3 off": {"save_every": 3, "offload": "optimizer_and_parameters", "zero_stage": 3},
    }
    said = run_ranks(steep_rank, 2, tmp_path / "ranks", str(tmp_path), settings)
    assert set(said[0] + said[1]) == {
        "step 2: the gradient is not finite: on rank 1 the gradients of terms ['steep'] are not, "
        "sample ids [17, 19, 21, 23]"
    }
    assert len(said[0]) == len(said[1]) == len(settings)
    for name in ("0", "1", "2", "3", "2 off", "3 off"):
        assert_same_state(tmp_path / name, single)
    for step in (3, 4):  # saved in the background: the same bytes
        found, expected = (manifest(tmp_path / name, step) for name in ("async", "1"))
        assert found == expected and len(found.files) == 2


# -----------------------------------------------------------------------------------------------
# Every objective at every stage

EVERY = {
    **{name: kind() for name, kind in OBJECTIVES.items()},
    "traflow_summed": EVERY_TERM,
    "traflow_summed-adaptive": replace(EVERY_TERM, weights="adaptive"),
    "traflow_summed-jvp": replace(EVERY_TERM, derivative="jvp"),
    "bezier_guides": GuidesConfig(variant="path", weight_drift=1.0),
    "bezier_guides-jvp": GuidesConfig(variant="path", derivative="jvp"),
    "meanflow-jvp": MeanFlowConfig(derivative="jvp"),
}
CASES = [(stage, name) for stage in range(4) for name in EVERY]
# Accumulation and recomputation on top, at two of the stages; not where a micro-batch sets the
# weights of the terms.
EXTRAS = {2: {"micro_batch": 2}, 3: {"micro_batch": 1, "activation_checkpointing": True}}
PLAIN = ("traflow_summed-adaptive",)


def fit_objective(engine, root: Path, config: TrainConfig, name: str) -> int:
    objective = build_objective(EVERY[name], 0, CPU, engine.gradient_norms)
    return fit(engine, root, config, objective)


def objectives_rank(rank: int, world_size: int, root: str, cases: list) -> list[int]:
    done = []
    for stage, name in cases:
        extras = {} if name in PLAIN else EXTRAS.get(stage, {})
        config = config_of(zero_stage=stage, max_steps=3, save_every=3, **extras)
        done.append(
            fit_objective(zero_engine(config), Path(root) / f"{stage}-{name}", config, name)
        )
    return done


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Three steps of every case: one start of two processes for all of them."""
    root = tmp_path_factory.mktemp("two")
    assert run_ranks(objectives_rank, 2, root / "ranks", str(root), CASES) == [[3] * len(CASES)] * 2
    return root


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    root, config = tmp_path_factory.mktemp("one"), config_of(max_steps=3, save_every=3)
    for name in EVERY:
        fit_objective(single_engine(config), root / name, config, name)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_three_steps_on_two_ranks_are_those_of_the_single_process(two_ranks, one_process, case):
    """Averages as near as their weights: at most 1.5e-6 off, where a gradient is mostly rounding.

    Adam divides such a gradient by its own size. It is in consistency and meanflow, at stages 2
    and 3, and the average is off by what its weight is, entry for entry. That an average adds
    nothing of its own, `test_zero_state` says: it is the recursion over its own engine's masters.
    """
    stage, name = case
    assert_same_run(two_ranks / f"{stage}-{name}", one_process / name, 3, average_rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_are_three_steps_on_four_ranks(tmp_path, one_process):
    run_ranks(objectives_rank, 4, tmp_path / "ranks", str(tmp_path), CASES)
    for stage, name in CASES:
        assert_same_run(tmp_path / f"{stage}-{name}", one_process / name, 3, average_rtol=1e-4)


# -----------------------------------------------------------------------------------------------
# Offload to host memory. A CPU rank's device is the host: these are DeepSpeed's own code paths for
# it, with copies that stay in one memory.


def offloaded_rank(rank: int, world_size: int, root: str, cases: dict) -> list[list[bool]]:
    """Trains every case; what DeepSpeed says that it has offloaded."""
    said = []
    for name, settings in cases.items():
        config = config_of(**settings)
        engine = zero_engine(config)
        assert fit(engine, f"{root}/{name}", config) == config.max_steps
        zero = engine._zero
        parts = [zero.offload_optimizer, zero.offload_param] if config.zero_stage == 3 else []
        said.append(parts or [zero.cpu_offload])
    return said


def accumulating(places: list, **settings) -> dict[str, dict]:
    """A case for every (stage, offload), in micro-batches of two samples."""
    return {
        f"{stage} {offload}": {"zero_stage": stage, "offload": offload, "micro_batch": 2} | settings
        for stage, offload in places
    }


def test_offloaded_to_host_memory_a_run_is_that_of_a_single_process(tmp_path, single):
    """With accumulation, for which DeepSpeed keeps more buffers; the chains above go without."""
    cases = accumulating(OFFLOADED)
    said = run_ranks(offloaded_rank, 2, tmp_path / "ranks", str(tmp_path), cases)
    assert said == [[[True], [True], [True, False], [True, True]]] * 2
    for name in cases:
        assert_same_run(tmp_path / name, single)


@pytest.mark.timeout(300)
def test_offload_changes_no_bit_of_weights_moments_and_averages(tmp_path):
    """In bf16 too, whose gradients DeepSpeed accumulates elsewhere; without clipping, for which the
    norm's summands are added in another order.
    """
    # Stage 3 last: it replaces F.linear for the whole process.
    cases = accumulating(sorted(PLACES[1:]), precision="bf16", grad_clip=0.0, max_steps=2)
    run_ranks(offloaded_rank, 2, tmp_path / "ranks", str(tmp_path), cases)
    for stage, offload in OFFLOADED:
        found, expected = (
            read_state(tmp_path / f"{stage} {kind}", 2) for kind in (offload, "none")
        )
        assert all(torch.equal(found[key], expected[key]) for key in expected), (stage, offload)


# -----------------------------------------------------------------------------------------------
# 16 bits


class LargeLoss:
    """The usual loss times 100, so that its gradients scaled by 2^16 leave the range of fp16."""

    def __init__(self) -> None:
        self.inner, self.calls = build_objective(EVERY_TERM, 0), 0

    def loss(self, batch, student, target, step):
        self.calls += 1
        result = self.inner.loss(batch, student, target, step)
        result.weights = {name: 100 * weight for name, weight in result.weights.items()}
        return result


def fp16_rank(rank: int, world_size: int, root: str) -> list[int]:
    """Evaluations of the loss at every stage, with and without offload."""
    allow_fp16()
    calls = []
    for stage, offload in FEWER:
        config = config_of(zero_stage=stage, offload=offload, precision="fp16")
        objective = LargeLoss()
        assert fit(zero_engine(config), f"{root}/{stage}-{offload}", config, objective) == 4
        calls.append(objective.calls)
    return calls


def test_a_step_that_overflows_in_fp16_is_taken_again_and_counts_once(tmp_path):
    """Step, learning rate, Adam's count and averages are those of float32; the cursor too."""
    calls = run_ranks(fp16_rank, 2, tmp_path / "ranks", str(tmp_path))
    assert calls[0] == calls[1] and min(calls[0]) > 4  # the fault did strike
    config = config_of()
    fit(single_engine(config), tmp_path / "fp32", config, LargeLoss())
    expected, start = read_state(tmp_path / "fp32", 4), moved_network().state_dict()
    for place in FEWER:
        root = tmp_path / "{}-{}".format(*place)
        assert windows(root) == windows(tmp_path / "fp32")
        found = read_state(root, 4)
        for kind in ("master", "ema/target", "ema/evaluation"):
            names = [key.removeprefix(f"{kind} ") for key in found if key.startswith(f"{kind} ")]
            before = torch.cat([start[name].flatten() for name in names])
            moves = [
                torch.cat([state[f"{kind} {name}"] for name in names]) - before
                for state in (found, expected)
            ]
            assert (moves[0] - moves[1]).norm() < 0.05 * moves[1].norm(), (place, kind)


def precision_rank(rank: int, world_size: int) -> tuple[str, list[float]]:
    """What fp16 says without hardware; by place in bf16, the largest error of a master."""
    import deepspeed

    said, gaps = "", []
    deepspeed.get_accelerator().is_fp16_supported = lambda: False
    try:
        zero_engine(config_of(precision="fp16"))
    except ConfigError as error:
        said = str(error)
    weights = {name: p.detach().flatten() for name, p in moved_network().named_parameters()}
    for stage, offload in FEWER:
        engine = zero_engine(config_of(precision="bf16", zero_stage=stage, offload=offload))
        masters = [f for f in engine.fragments() if f.kind == "master"]
        errors = [f.data - weights[f.name][f.start : f.start + len(f.data)] for f in masters]
        gaps.append(max(float(error.abs().max()) for error in errors))
    return said, gaps


def test_bf16_starts_from_the_float32_weights_and_fp16_wants_hardware(tmp_path):
    ((said, gaps),) = run_ranks(precision_rank, 1, tmp_path / "ranks")
    assert said == "train.precision=fp16 does not work on this device; set bf16 or fp32"
    assert gaps == [0.0] * len(FEWER)
