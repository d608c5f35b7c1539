"""The trainer: what ZeRO and the loop cost on one rank, and what a checkpoint costs.

    python benchmarks/trainer.py                    both sections
    python benchmarks/trainer.py checkpoint         one of them; the other stays as it was

overhead: `distill.train` with DeepSpeedEngine, logs included, against a bare PyTorch loop of the
same step. The two take turns, a step each; the ratio is that of the medians.
checkpoint: how long training stands still for a save, with and without `train.save_async`, how many
bytes are written, and how long it takes to verify and to load them.

Prints tables and writes docs/benchmarks/trainer.json, with the load of the machine before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from cluster.zero import DeepSpeedEngine  # noqa: E402
from distill.checkpoint import load_latest  # noqa: E402
from distill.config import DiTConfig, ImageSpec, TrainConfig  # noqa: E402
from distill.engine import frozen_copy, parameter_groups  # noqa: E402
from distill.manifest import latest_verified, verify  # noqa: E402
from distill.networks import build_network  # noqa: E402
from distill.objective_config import ReflowConfig  # noqa: E402
from distill.objectives import build_objective  # noqa: E402
from distill.rundir import RunDir, sync_directory  # noqa: E402
from distill.saver import Saver  # noqa: E402
from distill.testing import run_ranks  # noqa: E402
from distill.train import train  # noqa: E402
from distill.trajectory import TrajectoryBatch  # noqa: E402

IMAGE, CPU = ImageSpec(1, 8, 10), torch.device("cpu")
# Name: network, samples of a step, steps timed, and what the time may be against the bare loop.
NETWORKS: dict[str, tuple[DiTConfig, int, int, float]] = {
    "digits": (DiTConfig(patch_size=2, width=96, depth=4, num_heads=4, mlp_ratio=2.0), 256, 40, 15),
    "25 M": (DiTConfig(patch_size=2, width=384, depth=9, num_heads=6), 16, 12, 5),
}
WARM_UP = 3
ROUNDS = 5  # saves of each kind
STEPS_BETWEEN = 4  # while a save is written
OUT = ROOT / "docs" / "benchmarks" / "trainer.json"


def random_batch(size: int) -> TrajectoryBatch:
    """Trajectories of one teacher, of random numbers."""
    return TrajectoryBatch(
        states=torch.randn(size, 1, 3, *IMAGE.shape),
        times=torch.linspace(0, 1, 3),
        weights=torch.ones(1),
        labels=torch.arange(size) % IMAGE.num_classes,
        ids=torch.arange(size),
        positions=torch.arange(size),
        global_size=size,
    )


def trained(network: nn.Module) -> int:
    """Weights that are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def settings(batch_size: int, **more: Any) -> TrainConfig:
    """The defaults, but a constant learning rate."""
    return TrainConfig(batch_size=batch_size, decay="constant", warmup_steps=0, **more)


# -----------------------------------------------------------------------------------------------
# Overhead


def bare_step(config: TrainConfig, architecture: DiTConfig) -> Callable[[TrajectoryBatch], None]:
    """The same step by hand: loss, pass back, clipping, AdamW, two averages."""
    network = build_network(architecture, IMAGE, 0)
    averages = [frozen_copy(network) for _ in range(2)]
    weights = [p for p in network.parameters() if p.requires_grad]
    values: list[list[Tensor]] = [
        [a.get_parameter(n) for n, p in network.named_parameters() if p.requires_grad]
        for a in averages
    ]
    groups = parameter_groups(network, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.lr, (config.betas[0], config.betas[1]))
    objective = build_objective(ReflowConfig(), 0)

    def step(batch: TrajectoryBatch) -> None:
        objective.loss(batch, network, averages[0], 0).total.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, decay in zip(values, (config.ema_target, config.ema_evaluation), strict=True):
                torch._foreach_lerp_(kept, weights, 1 - decay)

    return step


def compare(name: str, stage: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step of the loop over ZeRO and of the bare one, in turn."""
    architecture, size, steps, bar = NETWORKS[name]
    config = settings(size, zero_stage=stage, max_steps=WARM_UP + steps, save_every=10**6)
    engine = DeepSpeedEngine(build_network(architecture, IMAGE, 0), config, CPU)
    bare, batch = bare_step(config, architecture), random_batch(size)
    ours: list[float] = []
    theirs: list[float] = []
    left = 0.0

    def read(step: int) -> TrajectoryBatch:
        nonlocal left
        entered = time.perf_counter()
        bare(batch)
        done = time.perf_counter()
        if step > WARM_UP:  # the loop has taken step - 1 since `read` was left
            ours.append(entered - left)
            theirs.append(done - entered)
        left = time.perf_counter()
        return batch

    train(
        engine,
        read,
        build_objective(ReflowConfig(), 0),
        config,
        RunDir(folder),
        origin={},
        wait_s=lambda: 0.0,
        should_stop=lambda: left > 0 and len(ours) >= steps - 1,
    )
    ratio = median(ours) / median(theirs)
    row = {"network": name, "zero_stage": stage, "bar_percent": bar}
    return row | {"loop_s": median(ours), "bare_s": median(theirs), "percent": 100 * (ratio - 1)}


def overhead(folder: Path) -> list[dict[str, Any]]:
    """Both networks at stages 0 to 2, on one rank."""
    rows = []
    for name in NETWORKS:
        for stage in (0, 1, 2):
            rows.append(compare(name, stage, folder / f"{name}-{stage}"))
    return rows


def overhead_rank(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    """In a process with a process group."""
    return overhead(Path(folder))


# -----------------------------------------------------------------------------------------------
# Checkpoints


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def plain_write(path: Path, size: int) -> None:
    """The same bytes, written and flushed: the disk alone."""
    with path.open("wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)
    path.unlink()


def checkpoint_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Saves of the larger network, with steps in between."""
    architecture, size, _, _ = NETWORKS["25 M"]
    config = settings(size, save_async=True)
    engine = DeepSpeedEngine(build_network(architecture, IMAGE, 0), config, CPU)
    objective, batch = build_objective(ReflowConfig(), 0), random_batch(size)
    checkpoints = RunDir(Path(folder)).checkpoints
    saves: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    alone: list[float] = []
    beside: list[float] = []
    done = 0

    def take_step() -> None:
        loss = objective.loss(batch, engine.student, engine.target, done).total
        engine.backward(loss, last=True)
        engine.step(done, config.lr)

    for _ in range(WARM_UP):
        take_step()
    for _ in range(ROUNDS):
        for save_async, times in ((False, alone), (True, beside)):
            done += 1
            kind = settings(size, save_async=save_async)
            with Saver(checkpoints, engine, kind, {}, saves[save_async].append) as saver:
                saver.save(done)
                times += [seconds_of(take_step) for _ in range(STEPS_BETWEEN)]
    found = latest_verified(checkpoints)
    assert found is not None
    written = saves[True][-1]["bytes"]
    weights = trained(build_network(architecture, IMAGE, 0))
    interval = TrainConfig().save_every * median(alone)
    stalls = {name: median(s["stall_s"] for s in saves[kind]) for name, kind in KINDS.items()}
    return {
        "weights": weights,
        "bytes": written,
        "bytes_over_least": written / (20 * weights),
        "step_s": median(alone),
        "step_beside_save_s": median(beside),
        "stall_s": stalls,
        "percent_of_interval": {k: 100 * s / (interval + s) for k, s in stalls.items()},
        "async_seconds": median(s["seconds"] for s in saves[True]),
        "plain_write_s": median(
            seconds_of(lambda: plain_write(checkpoints / "plain", written)) for _ in range(3)
        ),
        "verify_s": median(seconds_of(lambda: verify(found[1])) for _ in range(3)),
        "verify_and_load_s": median(
            seconds_of(lambda: load_latest(checkpoints, engine)) for _ in range(3)
        ),
    }


KINDS = {"sync": False, "async": True}

# -----------------------------------------------------------------------------------------------
# Tables


def show_overhead(rows: list[dict[str, Any]]) -> None:
    """Prints the section."""
    print("| network | stage | loop, ms | bare, ms | more | bar |\n|---|---|---|---|---|---|")
    for row in rows:
        times = f"{1e3 * row['loop_s']:.1f} | {1e3 * row['bare_s']:.1f}"
        more = f"{row['percent']:+.1f} % | {row['bar_percent']} %"
        print(f"| {row['network']} | {row['zero_stage']} | {times} | {more} |")


def show_checkpoint(found: dict[str, Any]) -> None:
    """Prints the section."""
    for name, value in found.items():
        parts = value if isinstance(value, dict) else {"": value}
        words = ", ".join(f"{part} {number:.4g}".strip() for part, number in parts.items())
        print(f"| {name} | {words} |")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=["overhead", "checkpoint"])
    options = parser.parse_args()
    record = json.loads(OUT.read_text()) if OUT.exists() else {}
    ranks = {
        "overhead": (overhead_rank, show_overhead),
        "checkpoint": (checkpoint_rank, show_checkpoint),
    }
    for name in options.sections:
        load, (measure, show) = os.getloadavg()[0], ranks[name]
        with tempfile.TemporaryDirectory(prefix="bowstring-") as folder:
            (found,) = run_ranks(measure, 1, Path(folder) / "rank", folder)
        show(found)
        record[name] = {
            "date": time.strftime("%Y-%m-%d"),
            "load_before": round(load, 2),
            "torch": torch.__version__,
            "networks": {k: asdict(v[0]) | {"batch": v[1]} for k, v in NETWORKS.items()},
            "found": found,
        }
        OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
