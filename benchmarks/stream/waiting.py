"""What a trainer waits for its data at a producer that is fast enough.

A process writes shards as fast as it can while `distill.training.loop` trains on them, on one core
each. The last row is a whole `run`: the pool with its leases and back-pressure, and a rank of Ray
Train, on a closed-form teacher that costs next to nothing.

The fraction is that of metrics.jsonl, after the first window: the wait for the first block is the
time to the first batch and stands apart.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sections import markdown
from benchmarks.stream.run import Run, mixture
from benchmarks.stream.shards import SHAPES, Shape
from distill.config import ImageSpec, TrainConfig
from distill.data.config import TrajectoryConfig
from distill.data.order import Order
from distill.data.shards import write_shard
from distill.data.stream import TrajectoryStream
from distill.engine.engine import TorchEngine
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.objectives.build import build_objective
from distill.objectives.config import EndpointConfig
from distill.run.files import RunDir, read_lines
from distill.training.build import build_callbacks
from distill.training.loop import train

BLOCK_SHARDS, PASSES, LOG_EVERY = 4, 2, 4
SMALL = DiTConfig(patch_size=4, width=96, depth=4, num_heads=6)
TINY = DiTConfig(patch_size=8, width=32, depth=1, num_heads=2)


def produce(shape: Shape, num_shards: int, root: Path, ready: Event) -> None:
    """Writes shards one after another, as fast as it can. All hold the same values."""
    torch.set_num_threads(1)
    made = shape.generated(0)
    ready.set()
    for shard in range(num_shards):
        ids = np.array(shape.spec.ids(shard), dtype=np.int64)
        generated = replace(made, ids=ids)
        write_shard(RunDir(root), shape.spec, shard, generated, 1.0, "benchmark")


def waiting(
    shape: Shape, student: str, network: DiTConfig, steps: int, root: Path
) -> dict[str, Any]:
    """What a trainer of `network` waits for its batches while a process makes the shards."""
    run, spec = RunDir(root), shape.spec
    config = TrainConfig(max_steps=steps, batch_size=128, log_every=LOG_EVERY, save_every=steps)
    order = Order(0, BLOCK_SHARDS * shape.count, PASSES, config.batch_size)
    num_shards = order.num_blocks(steps) * BLOCK_SHARDS
    image = ImageSpec(shape.image[0], shape.image[1], 10)
    engine = TorchEngine(build_network(network, image, 0), config, torch.device("cpu"))
    stream = TrajectoryStream(run, spec, TrajectoryConfig(), order, 0, 1, [[1.0]], lambda: False)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    producer = context.Process(target=produce, args=(shape, num_shards, root, ready))
    producer.start()
    ready.wait()
    began = time.perf_counter()
    stream.read(0)
    first_s = time.perf_counter() - began
    callbacks = build_callbacks(engine, stream, config, run, {})
    train(engine, stream, build_objective(EndpointConfig(), 0), config, callbacks)
    producer.join()
    stream.close()
    return {
        "shape": shape.name,
        "student": student,
        "steps": steps,
        "blocks": order.num_blocks(steps),
        "first_batch_s": first_s,
        **waits(run),
    }


def waits(run: RunDir) -> dict[str, float]:
    """Seconds of a step and share of the time spent waiting, after the first logged window."""
    first, *lines = read_lines(run.metrics)
    walls, before = [], first["step"]
    for line in lines:
        walls.append(line["step_s"] * (line["step"] - before))
        before = line["step"]
    waited = sum(x["data_wait_fraction"] * wall for x, wall in zip(lines, walls, strict=True))
    return {
        "step_s": sum(walls) / (before - first["step"]),
        "data_wait_fraction": waited / sum(walls),
    }


def whole_run(steps: int, folder: Path) -> dict[str, Any]:
    """The same of a run with everything of `experiment=digits` but its teacher and student."""
    run = Run(
        folder,
        [
            "student=dit_tiny",
            "objective=endpoint",
            *mixture(folder.with_suffix(".json")),
            f"train.max_steps={steps}",
            f"train.log_every={LOG_EVERY}",
            "train.save_every=1000",
            "cluster.teachers.num_workers=1",
            "cluster.trainer.num_workers=1",
        ],
    )
    run.finish(run.start("distil"))
    return {
        "shape": "a whole run: digits, closed-form teacher",
        "student": "width 32, depth 1",
        "steps": steps,
        "blocks": run.blocks,
        "first_batch_s": run.first_gradient_s(),
        **waits(run.files),
    }


# -----------------------------------------------------------------------------------------------
# The section


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """A row for every kind of shard and student."""
    steps = 24 if quick else 64
    rows = [
        waiting(SHAPES[0], "width 96, depth 4", SMALL, steps, folder / "digits"),
        waiting(SHAPES[1], "width 96, depth 4", SMALL, steps // 2, folder / "rgb"),
        waiting(SHAPES[1], "width 32, depth 1", TINY, 4 * steps, folder / "tiny"),
        whole_run(352 if quick else 1760, folder / "whole"),
    ]
    return {"rows": rows}


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [
        [
            row["shape"],
            row["student"],
            f"{row['step_s'] * 1000:.0f} ms",
            f"{row['blocks']}",
            f"{row['first_batch_s']:.2f} s",
            f"{row['data_wait_fraction']:.2%}",
        ]
        for row in found["rows"]
    ]
    head = ["shards", "student", "step", "blocks", "first batch", "data wait"]
    return f"{markdown([head, *rows])}\n\nBar: data wait below 2 %."
