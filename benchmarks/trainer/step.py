"""Each objective's step against a bare loop that makes the same forwards and backwards by hand.

    python benchmarks/trainer/step.py

Network, batch and number of forwards are the same on both sides. The bare loop has no objective, no
terms, no random times: it calls the network on the same number of rows, takes a mean square,
and steps the same AdamW. The two are timed in turn, many times, in one process; the ratio of the
medians is the overhead. Prints a table and writes docs/benchmarks/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from cluster.settings.hydra import compose
from distill.config import ImageSpec, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.objectives.build import build_objective
from distill.objectives.config import (
    Calls,
    ConsistencyConfig,
    EndpointConfig,
    GuidesConfig,
    MeanFlowConfig,
    ObjectiveConfig,
    ReflowConfig,
    SummedConfig,
    TraFlowConfig,
)

IMAGE = ImageSpec(1, 8, 10)
NETWORK = DiTConfig(patch_size=2, width=96, depth=4, num_heads=4, mlp_ratio=2.0)  # dit_digits
BATCH, GRID = 128, 8
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "traflow": TraFlowConfig(),
    "traflow_summed": SummedConfig(),
    "traflow_summed, consistency too": SummedConfig(weight_consistency=1.0),
    "scot": compose(["experiment=digits", "objective=scot"])[0].objective,
    "bezier_guides": GuidesConfig(variant="path"),
    "endpoint": EndpointConfig(),
    "reflow": ReflowConfig(),
    "consistency": ConsistencyConfig(),
    "meanflow": MeanFlowConfig(),
}


def random_batch(size: int = BATCH) -> TrajectoryBatch:
    """`size` trajectories of two teachers, of random numbers."""
    return TrajectoryBatch(
        states=torch.randn(size, 2, GRID + 1, *IMAGE.shape),
        times=torch.linspace(0, 1, GRID + 1),
        weights=torch.full((size, 2), 0.5),
        condition=torch.arange(size) % IMAGE.num_classes,
        ids=torch.arange(size),
        positions=torch.arange(size),
        global_size=size,
    )


def new_engine() -> TorchEngine:
    """A student in one process."""
    config = TrainConfig(batch_size=BATCH)
    return TorchEngine(build_network(NETWORK, IMAGE, 0), config, torch.device("cpu"))


def objective_step(config: ObjectiveConfig) -> Callable[[int], None]:
    """A step of the objective."""
    engine, batch = new_engine(), random_batch()
    objective = build_objective(config, 0, gradient_norms=engine.gradient_norms)

    def step(index: int) -> None:
        engine.backward(
            objective.loss(batch, engine.student, engine.target, index).total, last=True
        )
        engine.step(index, 1e-4)

    return step


def bare_step(calls: Calls) -> Callable[[int], None]:
    """A step of a loop by hand: the same rows through the same network, in the same modes."""
    engine = new_engine()
    noise = torch.randn(BATCH, *IMAGE.shape)
    labels = torch.arange(BATCH) % IMAGE.num_classes
    t, s = torch.rand(BATCH), torch.ones(BATCH)
    rows = int(calls.weights)
    x_rows = noise.repeat(rows, 1, 1, 1)
    t_rows, s_rows, label_rows = t.repeat(rows), s.repeat(rows), labels.repeat(rows)

    def step(index: int) -> None:
        out = engine.student(x_rows, t_rows, s_rows, label_rows)
        with torch.no_grad():
            whole, part = divmod(calls.plain, 1)
            for count in [BATCH] * int(whole) + [round(part * BATCH)]:
                if count > 0:
                    engine.target(noise[:count], t[:count], s[:count], labels[:count])
            for _ in range(int(calls.tangents)):
                torch.func.jvp(lambda s_: engine.student(noise, t, s_, labels), (s,), (t,))
        for _ in range(int(calls.inputs)):
            out = engine.target(out[-BATCH:], t, s, labels)
        loss = out.square().mean()
        for _ in range(int(calls.passes)):
            engine.gradient_norms([loss])
        engine.backward(loss, last=True)
        engine.step(index, 1e-4)

    return step


def compare(config: ObjectiveConfig, repeats: int) -> dict[str, float]:
    """Median seconds of a step of the objective and of the bare loop, timed in turn."""
    calls = config.calls()
    steps = {"objective": objective_step(config), "bare": bare_step(calls)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(repeats + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            step(index)
            if index >= 3:  # the first are warm-up
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["objective"], times["bare"], strict=True)]
    return {
        **asdict(calls),
        "forwards": calls.in_forwards,
        "objective_s": medians["objective"],
        "bare_s": medians["bare"],
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Times every objective and writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/train_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name, config in OBJECTIVES.items():
        row = compare(config, options.repeats)
        if not found:
            print("| objective |", " | ".join(row), "|")
            print("|---" * (len(row) + 1) + "|")
        found[name] = row
        cells = [
            f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()
        ]
        print("|", " | ".join([name, *cells]), "|")
    print(
        "\nCalls of the network: with gradient to the weights, plain, with gradient to the input,\n"
        "tangents (forward mode); last, passes back that adaptive weights make once more.\n"
        "In forwards: three (forward, a backward pass for inputs, one for weights), 1, 2, 2, 1."
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
