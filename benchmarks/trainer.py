"""The trainer: what ZeRO and the loop cost on one rank, and what a checkpoint costs.

    python benchmarks/trainer.py                    both sections, a few minutes of one core
    python benchmarks/trainer.py checkpoint         one of them; the other stays as it was

overhead: `distill.train` with DeepSpeedEngine, logs included, against a bare PyTorch loop of the
same step. The two are timed in turn, a step each, in one process.
checkpoint: how long training stands still for a save, with and without `train.save_async`, how many
bytes are written, and how long it takes to verify and to load them.

Prints the page and writes docs/benchmarks/trainer.json and trainer.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.stream_page import markdown  # noqa: E402
from benchmarks.train_step import BATCH, IMAGE, NETWORK, random_batch  # noqa: E402
from cluster.zero import DeepSpeedEngine  # noqa: E402
from distill.checkpoint import load_latest  # noqa: E402
from distill.config import DiTConfig, TrainConfig  # noqa: E402
from distill.engine import MASTER, frozen_copy, parameter_groups  # noqa: E402
from distill.manifest import latest_verified, verify  # noqa: E402
from distill.networks import build_network  # noqa: E402
from distill.objective_config import ReflowConfig  # noqa: E402
from distill.objectives import build_objective  # noqa: E402
from distill.rundir import RunDir, write_atomic  # noqa: E402
from distill.saver import Saver  # noqa: E402
from distill.testing import run_ranks  # noqa: E402
from distill.train import train  # noqa: E402
from distill.trajectory import TrajectoryBatch  # noqa: E402


class Case(NamedTuple):
    """A network, the samples and the number of its steps, and the bar of its overhead, per cent."""

    network: DiTConfig
    batch: int
    steps: int
    bar: float


CASES = {
    "digits": Case(NETWORK, BATCH, 60, 15),
    "25 M": Case(DiTConfig(patch_size=2, width=384, depth=9, num_heads=6), 16, 20, 5),
}
STAGES, WARM_UP = (0, 1, 2), 3
ROUNDS, STEPS_BESIDE = 5, 4  # saves of each kind, and steps while one is written
STALL_BAR, BYTES_BAR = 1.0, 1.1  # per cent of the time; bytes over the least there can be
LEAST_BYTES = 4 * (1 + 2 + 2)  # float32 of a weight: itself, Adam's two moments, two averages
CPU, OUT = torch.device("cpu"), ROOT / "docs" / "benchmarks" / "trainer.json"


def settings(case: Case, **more: Any) -> TrainConfig:
    """The defaults, but a constant learning rate."""
    return TrainConfig(batch_size=case.batch, decay="constant", warmup_steps=0, **more)


def new_engine(case: Case, config: TrainConfig) -> DeepSpeedEngine:
    """An engine of ZeRO on a network of its own."""
    return DeepSpeedEngine(build_network(case.network, IMAGE, 0), config, CPU)


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


# -----------------------------------------------------------------------------------------------
# Overhead


def bare_step(case: Case, config: TrainConfig) -> Callable[[TrajectoryBatch], None]:
    """The same step by hand: loss, pass back, clipping, AdamW, two averages."""
    network = build_network(case.network, IMAGE, 0)
    averages = [frozen_copy(network) for _ in range(2)]
    names, weights = zip(
        *[(name, p) for name, p in network.named_parameters() if p.requires_grad], strict=True
    )
    values = [[average.get_parameter(name) for name in names] for average in averages]
    decays = (config.ema_target, config.ema_evaluation)
    groups = parameter_groups(network, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.lr, (config.betas[0], config.betas[1]))
    objective = build_objective(ReflowConfig(), 0)

    def step(batch: TrajectoryBatch) -> None:
        objective.loss(batch, network, averages[0], 0).total.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, decay in zip(values, decays, strict=True):
                torch._foreach_lerp_(kept, weights, 1 - decay)

    return step


def compare(name: str, stage: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step of the loop over ZeRO and of the bare one, in turn.

    The bare step is taken inside `read`. So a step of the loop is the time from where `read` is
    left to where it is entered again.
    """
    case = CASES[name]
    config = settings(case, zero_stage=stage, max_steps=WARM_UP + case.steps, save_every=10**6)
    engine, bare = new_engine(case, config), bare_step(case, config)
    batch = random_batch(case.batch)
    entered, left, theirs = [], [], []

    def read(step: int) -> TrajectoryBatch:
        entered.append(time.perf_counter())
        theirs.append(seconds_of(lambda: bare(batch)))
        left.append(time.perf_counter())
        return batch

    train(
        engine,
        read,
        build_objective(ReflowConfig(), 0),
        config,
        RunDir(folder),
        origin={},
        wait_s=lambda: 0.0,
        should_stop=lambda: False,
    )
    ours = [
        end - start for start, end in zip(left[WARM_UP:-1], entered[WARM_UP + 1 :], strict=True)
    ]
    bares = theirs[WARM_UP + 1 :]
    ratio = median(a / b for a, b in zip(ours, bares, strict=True))
    times = {"loop_s": median(ours), "bare_s": median(bares)}
    return {"network": name, "zero_stage": stage, **times, "percent": 100 * (ratio - 1)}


def overhead_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Both networks at stages 0 to 2, on one rank."""
    rows = [compare(n, s, Path(folder) / f"{n}-{s}") for n in CASES for s in STAGES]
    return {"rows": rows}


def overhead_page(found: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    table = [["network", "ZeRO stage", "loop, ms", "bare, ms", "slower", "bar"]]
    for row in found["rows"]:
        times = [f"{1e3 * row['loop_s']:.1f}", f"{1e3 * row['bare_s']:.1f}"]
        percent, bar = f"{row['percent']:+.1f} %", f"{CASES[row['network']].bar} %"
        table.append([row["network"], str(row["zero_stage"]), *times, percent, bar])
    sizes = ", ".join(f"{name}: batch {case.batch}" for name, case in CASES.items())
    return [
        "`distill.train` with `DeepSpeedEngine` on one rank, with its logs, against a bare PyTorch",
        f"loop of the same step, reflow; {sizes}. Median of the ratios.",
        "",
        markdown(table),
    ]


# -----------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Saves of the larger network, both kinds in turn, with steps after each."""
    case, checkpoints = CASES["25 M"], RunDir(Path(folder)).checkpoints
    engine = new_engine(case, settings(case, save_async=True))
    objective, batch, lr = build_objective(ReflowConfig(), 0), random_batch(case.batch), 1e-4
    saves: dict[str, list[dict[str, Any]]] = {"sync": [], "async": []}
    steps: dict[str, list[float]] = {"sync": [], "async": []}  # seconds of those after a save

    def take_step() -> None:
        loss = objective.loss(batch, engine.student, engine.target, 0).total
        engine.backward(loss, last=True)
        engine.step(0, lr)

    for _ in range(WARM_UP):
        take_step()
    for index in range(2 * ROUNDS):
        kind = ("sync", "async")[index % 2]
        config = settings(case, save_async=kind == "async")
        with Saver(checkpoints, engine, config, {}, saves[kind].append) as saver:
            saver.save(index + 1)
            steps[kind] += [seconds_of(take_step) for _ in range(STEPS_BESIDE)]
    newest = latest_verified(checkpoints)
    assert newest is not None
    written, plain = saves["sync"][-1]["bytes"], checkpoints / "plain"
    weights = sum(f.data.numel() for f in engine.fragments() if f.kind == MASTER)
    step_s = median(steps["sync"])
    return {
        "weights": weights,
        "bytes": written,
        "bytes_over_least": written / (LEAST_BYTES * weights),
        "step_s": step_s,
        "saves": {kind: cost_of(saves[kind], steps[kind], step_s) for kind in saves},
        "plain_write_s": median(
            seconds_of(lambda: write_atomic(plain, bytes(written))) for _ in range(3)
        ),
        "verify_s": median(seconds_of(lambda: verify(newest[1])) for _ in range(3)),
        "verify_and_load_s": median(
            seconds_of(lambda: load_latest(checkpoints, engine)) for _ in range(3)
        ),
    }


def cost_of(saves: list[dict[str, Any]], steps: list[float], step_s: float) -> dict[str, float]:
    """Medians over saves, in seconds, and their share of the time at the default `save_every`.

    slower_s: by how much the steps after a save take longer than those with nothing beside them.
    """
    stall_s = median(save["stall_s"] for save in saves)
    after = [sum(steps[at : at + STEPS_BESIDE]) for at in range(0, len(steps), STEPS_BESIDE)]
    slower_s = median(after) - STEPS_BESIDE * step_s
    interval_s = TrainConfig().save_every * step_s
    return {
        "seconds": median(save["seconds"] for save in saves),
        "stall_s": stall_s,
        "stall_percent": 100 * stall_s / (interval_s + stall_s),
        "slower_s": slower_s,
        "slower_percent": 100 * slower_s / (interval_s + slower_s),
    }


def checkpoint_page(found: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    every = TrainConfig().save_every
    head = ["save", "whole, s", "training stands still, s", f"share at save_every={every}"]
    table = [[*head, "steps beside it are slower by, s", "share"]]
    for kind, cost in found["saves"].items():
        stall = [f"{cost['stall_s']:.2f}", f"{cost['stall_percent']:.2f} %"]
        slower = [f"{cost['slower_s']:.2f}", f"{cost['slower_percent']:.2f} %"]
        table.append([kind, f"{cost['seconds']:.2f}", *stall, *slower])
    wrote, plain = f"{found['bytes']:,} bytes", f"{found['plain_write_s']:.2f} s"
    check, load = f"{found['verify_s']:.2f} s", f"{found['verify_and_load_s']:.2f} s"
    return [
        f"{found['weights']:,} weights, a step of {found['step_s']:.2f} s; medians of {ROUNDS}",
        f"saves of each kind, in turn. Bar of the stall: {STALL_BAR} %.",
        "",
        markdown(table),
        "",
        f"{wrote}, {found['bytes_over_least']:.4f} times the least there can be, which is",
        f"{LEAST_BYTES} per weight: itself, Adam's moments and two averages in float32. Bar:",
        f"{BYTES_BAR}. The same bytes alone, written and flushed: {plain}. To verify: {check}; to",
        f"verify and load: {load}, from the page cache.",
    ]


# -----------------------------------------------------------------------------------------------
# Page

SECTIONS = {"overhead": overhead_rank, "checkpoint": checkpoint_rank}
PAGES = {"overhead": overhead_page, "checkpoint": checkpoint_page}


def page(record: dict[str, Any]) -> str:
    """docs/benchmarks/trainer.md."""
    lines = ["# The trainer", "", "`python benchmarks/trainer.py`", ""]
    for name, part in record.items():
        where = f"{part['date']}; {os.cpu_count()} cores, one thread, no GPU used"
        lines += [f"## {name.capitalize()}", "", *PAGES[name](part["found"]), ""]
        lines += [f"{where}; torch {part['torch']}; load before {part['load_before']}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    options = parser.parse_args()
    record = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in options.sections:
        load = round(os.getloadavg()[0], 2)
        with tempfile.TemporaryDirectory(prefix="bowstring-") as folder:
            (found,) = run_ranks(SECTIONS[name], 1, Path(folder) / "rank", folder)
        about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        record[name] = {**about, "load_before": load, "found": found}
    record = {name: record[name] for name in SECTIONS if name in record}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
