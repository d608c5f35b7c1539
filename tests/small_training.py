"""Trainings of a small network, in one process and on the ranks of `distill.testing.run_ranks`.

For the tests of the loop, of ZeRO and of its checkpoints: what a rank imports must be a module.
"""

from pathlib import Path

import torch

from distill.checkpoint import commit as checkpoint
from distill.checkpoint.commit import load_latest
from distill.checkpoint.manifest import Manifest
from distill.config import ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.noise import sample_noise
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.objectives.build import build_objective
from distill.objectives.config import SummedConfig
from distill.run.files import RunDir, read_lines
from distill.testing import GaussianFlow
from distill.training.build import build_callbacks
from distill.training.loop import train

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
# Every term, whatever the defaults are; a grid of four holds the times of two and four steps.
EVERY_TERM = SummedConfig(
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
        weights=torch.ones(len(ids), 1),
        condition=torch.from_numpy(ids % 3),
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        global_size=size,
    )


class Reads:
    """A source that never waits, from a function of the step."""

    wait_s = 0.0

    def __init__(self, read) -> None:
        self.read = read


def fit_all(
    engine, read, objective, config: TrainConfig, root: str | Path, origin=None, more=(), **options
) -> int:
    """Trains on from what is in `root`, with everything that hangs on a training of a run."""
    source, run = Reads(read), RunDir(Path(root))
    flops = options.pop("flops", None)
    callbacks = [*build_callbacks(engine, source, config, run, origin or {}, flops), *more]
    start = load_latest(run.checkpoints, engine)
    return train(engine, source, objective, config, callbacks, start=start, **options)


def fit(
    engine,
    root: str | Path,
    config: TrainConfig,
    objective=None,
    until: int = 10**6,
    is_asked=lambda: False,
) -> int:
    """Trains on from what is in `root`, to the end, to step `until`, or until it is asked."""
    last = [0]

    def read(step: int) -> TrajectoryBatch:
        last[0] = step
        return read_share(step, engine.rank, engine.world_size, config.batch_size)

    objective = objective or build_objective(EVERY_TERM, 0)

    def is_over() -> bool:
        return is_asked() or last[0] + 1 >= until

    return fit_all(engine, read, objective, config, root, should_stop=is_over)


def single_engine(config: TrainConfig) -> TorchEngine:
    return TorchEngine(moved_network(), config, CPU)


def zero_engine(config: TrainConfig):
    from cluster.trainer.zero import DeepSpeedEngine

    return DeepSpeedEngine(moved_network(), config, CPU)


def allow_fp16() -> None:
    """DeepSpeed wants a processor with instructions for fp16; torch computes it without them."""
    import deepspeed

    deepspeed.get_accelerator().is_fp16_supported = lambda: True


def moved_network():
    """Every weight moved, so that no gradient is near 0, where Adam makes rounding large."""
    built = build_network(NETWORK, IMAGE, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


def read_state(root: Path, step: int) -> dict[str, torch.Tensor]:
    folder = RunDir(root).checkpoints / f"step_{step:08d}"
    read = checkpoint.fragment_reader(folder)
    shapes = checkpoint.manifest.read_manifest(folder).parameters
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema/target", "ema/evaluation")
    return {
        f"{kind} {name}": read(kind, name, 0, torch.Size(shape).numel())
        for kind in kinds
        for name, shape in shapes.items()
    }


def manifest(root: Path, step: int) -> Manifest:
    return checkpoint.manifest.read_manifest(RunDir(root).checkpoints / f"step_{step:08d}")


def windows(root: Path) -> list[tuple[int, int, str]]:
    events = read_lines(RunDir(root).events)
    return [(e["first"], e["last"], e["ids_sha256"]) for e in events if e["kind"] == "steps"]


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
