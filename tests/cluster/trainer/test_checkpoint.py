"""A checkpoint is the run's, not the ranks': it opens on any number, and a dying rank leaves none.

What one process can show of a save, kill -9 at every call of it, damage, a full disk, is in
tests/distill/checkpoint/test_checkpoint.py.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from small_training import (
    PLACES,
    assert_same_run,
    assert_same_state,
    config_of,
    fit,
    moved_network,
    single_engine,
    zero_engine,
)

from distill.checkpoint import commit as checkpoint
from distill.checkpoint.manifest import latest_verified
from distill.config import TrainConfig
from distill.engine.engine import TorchEngine
from distill.run.files import RunDir, read_lines
from distill.testing import run_ranks
from distill.training.loop import learning_rate

# -----------------------------------------------------------------------------------------------
# Any world size, any stage, in host memory or not

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
# A rank dies in the background


def async_config(stage: int) -> TrainConfig:
    return config_of(zero_stage=stage, save_async=True)


def dying_rank(rank: int, world_size: int, root: str, stage: int) -> int:
    """Rank 1 is killed while it writes its part of the state after four steps."""
    write = checkpoint.files.write_atomic

    def die(path: Path, data: bytes) -> None:
        if rank == 1 and path.parent.name.startswith("step_00000004"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    checkpoint.files.write_atomic = die
    return fit(zero_engine(async_config(stage)), root, async_config(stage))


def resuming_rank(rank: int, world_size: int, root: str, stage: int) -> int:
    return fit(zero_engine(async_config(stage)), root, async_config(stage))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_dies_while_it_writes_and_the_run_goes_on(tmp_path, stage):
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(dying_rank, 2, tmp_path / "dies", str(tmp_path / "run"), stage)
    assert latest_verified(RunDir(tmp_path / "run").checkpoints)[0] == 2
    done = run_ranks(resuming_rank, 2, tmp_path / "goes on", str(tmp_path / "run"), stage)
    assert done == [4, 4]
    config = config_of()
    fit(single_engine(config), tmp_path / "single", config)
    assert_same_state(tmp_path / "run", tmp_path / "single")


# -----------------------------------------------------------------------------------------------
# What is not trained


def network_with_own_positions():
    """As of a teacher for a higher resolution."""
    network = moved_network()
    network.get_buffer("pos_embed").mul_(1.1)
    return network


def fixed_rank(rank: int, world_size: int, root: str) -> None:
    from cluster.trainer.zero import DeepSpeedEngine

    config = config_of(zero_stage=3, precision="bf16")
    engine = DeepSpeedEngine(network_with_own_positions(), config, torch.device("cpu"))
    snapshot = checkpoint.take_snapshot(1, engine, {})
    checkpoint.commit(Path(root), snapshot, engine, keep_last=1)


def test_positions_are_saved_in_float32_whatever_the_precision(tmp_path):
    run_ranks(fixed_rank, 2, tmp_path / "ranks", str(tmp_path / "checkpoints"))
    fixed = checkpoint.read_fixed(tmp_path / "checkpoints/step_00000001")
    expected = network_with_own_positions().get_buffer("pos_embed")
    assert list(fixed) == ["pos_embed"] and torch.equal(fixed["pos_embed"], expected)
