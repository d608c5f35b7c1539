"""ZeRO is the single process, on any number of ranks: steps, averages, checkpoints."""

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
from distill.objective_config import TraFlowConfig
from distill.objectives import build_objective
from distill.rundir import RunDir, read_lines
from distill.testing import GaussianFlow, run_ranks
from distill.train import TrainingError, train
from distill.trajectory import TrajectoryBatch

IMAGE = ImageSpec(1, 4, 3)
NETWORK = DiTConfig(patch_size=2, width=16, depth=2, num_heads=2)
CPU = torch.device("cpu")
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


def read_share(step: int, rank: int, world_size: int) -> TrajectoryBatch:
    import numpy as np

    positions = np.arange(rank, 8, world_size)
    ids = step * 8 + positions
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
        global_size=8,
    )


def fit(engine, root: str, config: TrainConfig, objective=None) -> int:
    return train(
        engine,
        lambda step: read_share(step, engine.rank, engine.world_size),
        objective or build_objective(EVERY_TERM, 0),
        config,
        RunDir(Path(root)),
        origin={},
        wait_s=lambda: 0.0,
        should_stop=lambda: False,
    )


def zero_rank(rank: int, world_size: int, root: str, settings: dict) -> int:
    from cluster.zero import DeepSpeedEngine

    config = config_of(**settings)
    engine = DeepSpeedEngine(build_network(NETWORK, IMAGE, seed=3), config, CPU)
    return fit(engine, root, config)


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
    from cluster.zero import DeepSpeedEngine

    said = []
    for name, more in settings.items():
        config, folder = config_of(**more), f"{root}/{name}"
        engine = DeepSpeedEngine(build_network(NETWORK, IMAGE, seed=3), config, CPU)
        try:
            fit(engine, folder, config, SteepOnRankOne())
        except TrainingError as error:
            said.append(str(error))
        assert latest_verified(RunDir(Path(folder)).checkpoints)[0] == 2
        assert fit(engine, folder, config) == 4
    return said


def fit_adaptively(engine, root: str, config: TrainConfig) -> int:
    adaptive = replace(EVERY_TERM, weights="adaptive")
    return fit(engine, root, config, build_objective(adaptive, 0, CPU, engine.gradient_norms))


def adaptive_rank(rank: int, world_size: int, root: str) -> int:
    from cluster.zero import DeepSpeedEngine

    config = config_of(zero_stage=2)
    engine = DeepSpeedEngine(build_network(NETWORK, IMAGE, seed=3), config, CPU)
    return fit_adaptively(engine, root, config)


def bf16_masters_rank(rank: int, world_size: int) -> float:
    from cluster.zero import DeepSpeedEngine

    network = build_network(NETWORK, IMAGE, seed=3)
    weights = {name: p.detach().clone().flatten() for name, p in network.named_parameters()}
    engine = DeepSpeedEngine(network, config_of(precision="bf16"), CPU)
    masters = [f for f in engine.fragments() if f.kind == "master"]
    gaps = [(f.data - weights[f.name][f.start : f.start + len(f.data)]).abs() for f in masters]
    return max(float(gap.max()) for gap in gaps)


def refused_rank(rank: int, world_size: int) -> str:
    from cluster.zero import DeepSpeedEngine

    try:
        DeepSpeedEngine(build_network(NETWORK, IMAGE), config_of(zero_stage=3), CPU)
    except ConfigError as error:
        return str(error)
    return ""


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


def windows(root: Path) -> list[tuple[int, int, str]]:
    events = read_lines(RunDir(root).events)
    return [(e["first"], e["last"], e["ids_sha256"]) for e in events if e["kind"] == "steps"]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Four steps in one process: the reference."""
    root = tmp_path_factory.mktemp("single")
    config = config_of()
    fit(TorchEngine(build_network(NETWORK, IMAGE, seed=3), config, CPU), str(root), config)
    return root


def assert_same_state(found: Path, expected: Path) -> None:
    reference = read_state(expected, 4)
    for key, value in read_state(found, 4).items():
        torch.testing.assert_close(value, reference[key], rtol=1e-3, atol=2e-6, msg=key)


def assert_same_run(found: Path, expected: Path) -> None:
    assert_same_state(found, expected)
    assert windows(found) == windows(expected)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_weights_change(
    tmp_path, single
):
    """The state before the step is saved, so the run that goes on is the healthy one."""
    settings = {
        "1": {"save_every": 3},
        "2": {"save_every": 3, "zero_stage": 2, "micro_batch": 2},
        "bf16": {"save_every": 3, "precision": "bf16"},
    }
    said = run_ranks(steep_rank, 2, tmp_path / "ranks", str(tmp_path), settings)
    assert set(said[0] + said[1]) == {
        "step 2: the gradient is not finite: on rank 1 the gradients of terms ['steep'] are not, "
        "sample ids [17, 19, 21, 23]"
    }
    assert len(said[0]) == len(said[1]) == len(settings)
    for name in ("1", "2"):
        assert_same_state(tmp_path / name, single)


@pytest.mark.parametrize("settings", [{}, {"zero_stage": 2, "micro_batch": 2}], ids=["1", "2"])
def test_zero_on_two_ranks_is_the_single_process(tmp_path, single, settings):
    assert run_ranks(zero_rank, 2, tmp_path / "ranks", str(tmp_path / "run"), settings) == [4, 4]
    assert_same_run(tmp_path / "run", single)


def test_weights_by_gradient_norms_are_those_of_the_single_process(tmp_path):
    config, root = config_of(), str(tmp_path / "one")
    fit_adaptively(TorchEngine(build_network(NETWORK, IMAGE, seed=3), config, CPU), root, config)
    run_ranks(adaptive_rank, 2, tmp_path / "ranks", str(tmp_path / "two"))
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_run_goes_on_at_another_world_size(tmp_path, single):
    """Two steps in one plain process, then three ranks would not divide 8: two and one do."""
    config, root = config_of(max_steps=2, decay="constant"), tmp_path / "run"
    fit(TorchEngine(build_network(NETWORK, IMAGE, seed=3), config, CPU), str(root), config)
    run_ranks(zero_rank, 2, tmp_path / "two", str(root), {"max_steps": 3, "decay": "constant"})
    run_ranks(zero_rank, 1, tmp_path / "one", str(root), {"max_steps": 4, "decay": "constant"})
    reference, config = tmp_path / "reference", config_of(decay="constant")
    fit(TorchEngine(build_network(NETWORK, IMAGE, seed=3), config, CPU), str(reference), config)
    expected = read_state(reference, 4)
    for key, value in read_state(root, 4).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-6, msg=key)


def test_bf16_starts_from_the_float32_weights(tmp_path):
    assert run_ranks(bf16_masters_rank, 1, tmp_path / "ranks") == [0.0]


def test_a_stage_that_is_not_supported_is_refused_with_the_way_out(tmp_path):
    (said,) = run_ranks(refused_rank, 1, tmp_path / "ranks")
    assert said == "train.zero_stage=3 is not supported; use 1 or 2"
