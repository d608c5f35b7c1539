"""ZeRO is the single process, on any number of ranks: steps, averages, checkpoints."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill import checkpoint
from distill.config import ConfigError, DiTConfig, ImageSpec, TrainConfig
from distill.engine import TorchEngine
from distill.manifest import latest_verified
from distill.networks import build_network
from distill.noise import sample_noise
from distill.objective_config import (
    BezierConfig,
    ConsistencyConfig,
    EndpointConfig,
    MeanFlowConfig,
    ReflowConfig,
    TraFlowConfig,
)
from distill.objectives import build_objective
from distill.rundir import RunDir, read_lines
from distill.testing import GaussianFlow, run_ranks
from distill.train import TrainingError, learning_rate, train
from distill.trajectory import TrajectoryBatch

IMAGE = ImageSpec(1, 4, 3)
NETWORK = DiTConfig(patch_size=2, width=16, depth=2, num_heads=2)
CPU = torch.device("cpu")
OFFLOADED = [  # (stage, what lies in host memory)
    (1, "optimizer"),
    (2, "optimizer"),
    (3, "optimizer"),
    (3, "optimizer_and_parameters"),
]
PLACES = [(stage, "none") for stage in range(4)] + OFFLOADED
FEWER = [place for place in PLACES if place not in ((1, "optimizer"), (3, "optimizer"))]
# Every term, whatever the defaults are; a grid of four holds the times of two and four steps.
EVERY_TERM = TraFlowConfig(
    weight_output=1.0,
    weight_states=1.0,
    weight_velocity=1.0,
    weight_consistency=1.0,
    weight_flow_matching=0.1,
    sampler_nfe=[2, 4],
)


def config_of(**settings) -> TrainConfig:
    defaults = {"max_steps": 4, "batch_size": 8, "log_every": 2, "save_every": 2, "lr": 2e-3}
    return TrainConfig(**{**defaults, "weight_decay": 0.1, **settings})


def read_share(step: int, rank: int, world_size: int, size: int = 8) -> TrajectoryBatch:
    import numpy as np

    positions = np.arange(rank, size, world_size)
    ids = step * size + positions
    flow = GaussianFlow(torch.full(IMAGE.shape, 0.5), 0.3)
    x_0 = torch.from_numpy(sample_noise(0, ids, IMAGE.shape))
    times = torch.linspace(0, 1, 5)
    return TrajectoryBatch(
        states=torch.stack([flow.map(x_0, 0.0, float(t)) for t in times], dim=1)[:, None],
        times=times,
        weights=torch.ones(1),
        labels=torch.from_numpy(ids % 3),
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        global_size=size,
    )


def fit(engine, root: str | Path, config: TrainConfig, objective=None, until: int = 10**6) -> int:
    """Trains on from what is in `root`, to the end or to step `until`."""
    last = [0]

    def read(step: int) -> TrajectoryBatch:
        last[0] = step
        return read_share(step, engine.rank, engine.world_size, config.batch_size)

    return train(
        engine,
        read,
        objective or build_objective(EVERY_TERM, 0),
        config,
        RunDir(Path(root)),
        origin={},
        wait_s=lambda: 0.0,
        should_stop=lambda: last[0] + 1 >= until,
    )


def single_engine(config: TrainConfig) -> TorchEngine:
    return TorchEngine(moved_network(), config, CPU)


def zero_engine(config: TrainConfig):
    from cluster.zero import DeepSpeedEngine

    return DeepSpeedEngine(moved_network(), config, CPU)


def moved_network():
    """Every weight moved, so that no gradient is near 0, where Adam makes rounding large."""
    built = build_network(NETWORK, IMAGE, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


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


def allow_fp16() -> None:
    """DeepSpeed wants a processor with instructions for fp16; torch computes it without them."""
    import deepspeed

    deepspeed.get_accelerator().is_fp16_supported = lambda: True


def read_state(root: Path, step: int) -> dict[str, torch.Tensor]:
    folder = RunDir(root).checkpoints / f"step_{step:08d}"
    read = checkpoint.fragment_reader(folder)
    shapes = checkpoint.read_manifest(folder)["parameters"]
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema/target", "ema/evaluation")
    return {
        f"{kind} {name}": read(kind, name, 0, torch.Size(shape).numel())
        for kind in kinds
        for name, shape in shapes.items()
    }


def manifest(root: Path, step: int) -> dict:
    return checkpoint.read_manifest(RunDir(root).checkpoints / f"step_{step:08d}")


def windows(root: Path) -> list[tuple[int, int, str]]:
    events = read_lines(RunDir(root).events)
    return [(e["first"], e["last"], e["ids_sha256"]) for e in events if e["kind"] == "steps"]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Four steps in one process: the reference."""
    root = tmp_path_factory.mktemp("single")
    config = config_of()
    fit(single_engine(config), root, config)
    return root


def without_key_bias(key: str, value: torch.Tensor) -> torch.Tensor:
    """Softmax does not feel the keys' bias: its gradient is rounding, and Adam steps by that."""
    if not key.endswith("attn.qkv.bias"):
        return value
    query, _, content = value.chunk(3)
    return torch.cat([query, content])


def assert_same_state(
    found: Path, expected: Path, step: int = 4, average_rtol: float = 0.0
) -> None:
    """Weights and moments within rounding through Adam; averages to 1e-6, and `average_rtol`."""
    reference = read_state(expected, step)
    for key, value in read_state(found, step).items():
        rtol, atol = (average_rtol, 1e-6) if key.startswith("ema/") else (1e-3, 2e-6)
        ours, theirs = without_key_bias(key, value), without_key_bias(key, reference[key])
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=key)


def assert_same_run(found: Path, expected: Path, step: int = 4, average_rtol: float = 0.0) -> None:
    assert_same_state(found, expected, step, average_rtol)
    assert windows(found) == windows(expected)


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
        assert found == expected and len(found["files"]) == 2


# -----------------------------------------------------------------------------------------------
# Every objective at every stage

OBJECTIVES = {
    "traflow": EVERY_TERM,
    "traflow-adaptive": replace(EVERY_TERM, weights="adaptive"),
    "traflow-jvp": replace(EVERY_TERM, derivative="jvp"),
    "traflow-double": replace(EVERY_TERM, derivative="double_backward"),
    "bezier": BezierConfig(variant="path", weight_drift=1.0),
    "bezier-jvp": BezierConfig(variant="path", derivative="jvp"),
    "endpoint": EndpointConfig(),
    "reflow": ReflowConfig(),
    "consistency": ConsistencyConfig(),
    "meanflow": MeanFlowConfig(),
    "meanflow-jvp": MeanFlowConfig(derivative="jvp"),
}
CASES = [
    (stage, name)
    for stage in range(4)
    for name in OBJECTIVES
    if (stage, name) != (3, "traflow-double")  # cluster.config refuses it
]
# Accumulation and recomputation on top, at two of the stages; not where a micro-batch sets the
# weights of the terms, or where cluster.config refuses it.
EXTRAS = {2: {"micro_batch": 2}, 3: {"micro_batch": 1, "activation_checkpointing": True}}
PLAIN = ("traflow-adaptive", "traflow-double")


def fit_objective(engine, root: Path, config: TrainConfig, name: str) -> int:
    objective = build_objective(OBJECTIVES[name], 0, CPU, engine.gradient_norms)
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
    for name in OBJECTIVES:
        fit_objective(single_engine(config), root / name, config, name)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_three_steps_on_two_ranks_are_those_of_the_single_process(two_ranks, one_process, case):
    """Averages as near as weights: some of these losses have gradients that are mostly rounding."""
    stage, name = case
    assert_same_run(two_ranks / f"{stage}-{name}", one_process / name, 3, average_rtol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_are_three_steps_on_four_ranks(tmp_path, one_process):
    run_ranks(objectives_rank, 4, tmp_path / "ranks", str(tmp_path), CASES)
    for stage, name in CASES:
        assert_same_run(tmp_path / f"{stage}-{name}", one_process / name, 3, average_rtol=1e-3)


# -----------------------------------------------------------------------------------------------
# Any world size, any stage

STEPS, DECAY = 10, 5.0
WORLDS = (1, 2, 4, 3, 1)  # two steps on each
CHAINS = {f"{stage} {offload}": [(stage, offload)] * 5 for stage, offload in PLACES}
CHAINS |= {
    "up and down": [(stage, "none") for stage in (0, 3, 1, 2, 0)],
    "back and forth": [(stage, "none") for stage in (3, 0, 2, 3, 1)],
    "to the host and back": [PLACES[index] for index in (1, 7, 0, 4, 3)],
}


def chain_config(stage: int, offload: str = "none") -> TrainConfig:
    """Twelve divides by every world size; the learning rate differs from step to step."""
    settings = {"max_steps": STEPS, "batch_size": 12, "save_every": 100, "log_every": 1}
    settings |= {"zero_stage": stage, "offload": offload}
    return config_of(warmup_steps=2, weight_decay=DECAY, **settings)


def chain_rank(rank: int, world_size: int, root: str, places: dict, until: int) -> list:
    """Goes on with every chain to step `until`; hyper-parameters of every group afterwards."""
    found = []
    for name, place in places.items():
        config = chain_config(*place)
        engine = zero_engine(config)
        assert fit(engine, Path(root) / name, config, until=until) == until
        found.append([(g["weight_decay"], g["lr"]) for g in engine._zero.param_groups])
    return found


def losses(root: Path) -> dict[int, tuple[float, float]]:
    return {line["step"]: (line["loss"], line["lr"]) for line in read_lines(RunDir(root).metrics)}


def one_group(config: TrainConfig) -> TorchEngine:
    """An engine that has lost the settings of all parameter groups but the first."""
    engine = single_engine(config)
    for group in engine._optimizer.param_groups:
        group["weight_decay"] = config.weight_decay
    return engine


def run_chains(root: Path, worlds: tuple[int, ...], chains: dict) -> None:
    for index, world_size in enumerate(worlds):
        places = {name: chain[index] for name, chain in chains.items()}
        until = 2 * index + 2
        found = run_ranks(chain_rank, world_size, root / f"{index}", str(root), places, until)
        lr = learning_rate(until - 1, chain_config(0))
        assert found == [[[(DECAY, lr), (0.0, lr)]] * len(chains)] * world_size


def assert_chain_is(found: Path, expected: Path, steps: int) -> None:
    """Loss and learning rate of every step, ids of every batch, and the state at the end."""
    assert_same_run(found, expected, steps)
    assert losses(found).keys() == losses(expected).keys() == set(range(1, steps + 1))
    for step, (loss, lr) in losses(found).items():
        assert loss == pytest.approx(losses(expected)[step][0], rel=1e-4), step
        assert lr == losses(expected)[step][1]


def test_a_run_goes_on_at_another_world_size_stage_and_offload(tmp_path):
    """From two ranks to one, with a stage changed on the way, to host memory or from it."""
    stages = {"3 to 1": (3, 1), "0 to 3": (0, 3), "1 to 0": (1, 0), "2 to 2": (2, 2)}
    chains = {name: [(stage, "none") for stage in pair] for name, pair in stages.items()}
    chains |= {
        "1 off to 3": [(1, "optimizer"), (3, "none")],
        "3 off to 0": [(3, "optimizer_and_parameters"), (0, "none")],
        "0 to 2 off": [(0, "none"), (2, "optimizer")],
        "2 to 3 off": [(2, "none"), (3, "optimizer_and_parameters")],
    }
    run_chains(tmp_path, (2, 1), chains)
    config = chain_config(0)
    fit(single_engine(config), tmp_path / "whole", config, until=4)
    for name in chains:
        assert_chain_is(tmp_path / name, tmp_path / "whole", 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_four_three_one_ranks_are_an_uninterrupted_process(tmp_path):
    run_chains(tmp_path, WORLDS, CHAINS)
    config = chain_config(0)
    fit(single_engine(config), tmp_path / "whole", config)
    for name in CHAINS:
        assert_chain_is(tmp_path / name, tmp_path / "whole", STEPS)


def test_a_decay_copied_to_norms_and_biases_would_be_seen(tmp_path):
    """So the tests above do prove that a parameter group keeps its own settings."""
    config = chain_config(0)
    for name, build in (("whole", single_engine), ("copied", one_group)):
        fit(build(config), tmp_path / name, config, until=4)
    with pytest.raises(AssertionError, match="bias"):
        assert_same_state(tmp_path / "copied", tmp_path / "whole", 4)


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


# -----------------------------------------------------------------------------------------------
# A rank dies in the background


def async_config(stage: int) -> TrainConfig:
    return config_of(zero_stage=stage, save_async=True)


def dying_rank(rank: int, world_size: int, root: str, stage: int) -> int:
    """Rank 1 is killed while it writes its part of the state after four steps."""
    write = checkpoint.write_atomic

    def die(path: Path, data: bytes) -> None:
        if rank == 1 and path.parent.name.startswith("step_00000004"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    checkpoint.write_atomic = die
    return fit(zero_engine(async_config(stage)), root, async_config(stage))


def resuming_rank(rank: int, world_size: int, root: str, stage: int) -> int:
    return fit(zero_engine(async_config(stage)), root, async_config(stage))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_dies_while_it_writes_and_the_run_goes_on(tmp_path, single, stage):
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(dying_rank, 2, tmp_path / "dies", str(tmp_path / "run"), stage)
    assert latest_verified(RunDir(tmp_path / "run").checkpoints)[0] == 2
    done = run_ranks(resuming_rank, 2, tmp_path / "goes on", str(tmp_path / "run"), stage)
    assert done == [4, 4]
    assert_same_state(tmp_path / "run", single)
