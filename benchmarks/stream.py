"""The trajectory stream against plain webdataset, and what a trainer waits for its data.

    python benchmarks/stream.py            about 3 minutes on 2 cores
    python benchmarks/stream.py --quick    fewer rounds and steps; writes nothing

Shards: the same samples are written by `distill.shards` (sha256, flushed to disk, sidecar, atomic
names) and by webdataset's ShardWriter (none of these), and read back whole by `read_shard` (sha256
checked) and by webdataset's own reader. Rounds alternate; what counts is the median of the ratios.

Waiting: a process writes shards as fast as it can while `distill.train` trains on them, on one
core each. The fraction is that of metrics.jsonl, after the first window: the wait for the first
block is the time to the first batch and stands apart.

The whole run writes docs/benchmarks/stream.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import webdataset  # noqa: E402

from distill.config import DiTConfig, ImageSpec, TrainConfig, TrajectoryConfig  # noqa: E402
from distill.engine import TorchEngine  # noqa: E402
from distill.generate import GeneratedShard  # noqa: E402
from distill.layout import stored_dtype, tar_bytes  # noqa: E402
from distill.ledger import ShardSpec, TeacherSpec  # noqa: E402
from distill.networks import build_network  # noqa: E402
from distill.objective_config import EndpointConfig  # noqa: E402
from distill.objectives import build_objective  # noqa: E402
from distill.order import Order  # noqa: E402
from distill.rundir import RunDir, read_lines  # noqa: E402
from distill.shards import read_shard, write_shard  # noqa: E402
from distill.stream import TrajectoryStream  # noqa: E402
from distill.train import train  # noqa: E402

BLOCK_SHARDS, PASSES, LOG_EVERY = 4, 2, 4


@dataclass(frozen=True)
class Shape:
    """Shards of one kind: `points` states of images [C, H, W], float16."""

    name: str
    image: tuple[int, int, int]
    points: int
    count: int  # samples of a shard
    shards: int  # in a round

    @property
    def spec(self) -> ShardSpec:
        """What the shards share."""
        times = tuple(np.linspace(0, 1, self.points).tolist())
        teacher = TeacherSpec("teacher", 64 * "0", "heun", 16, 1.0)
        return ShardSpec(0, times, "float16", True, self.image, self.count, (teacher,))

    def generated(self, shard: int) -> GeneratedShard:
        """A shard of normal values; its labels are 0 .. 9 in turn."""
        spec = self.spec
        generator = torch.Generator().manual_seed(shard)
        states = torch.randn(self.count, *spec.sample_shape, generator=generator)
        ids = np.array(spec.ids(shard), dtype=np.int64)
        return GeneratedShard(states, ids % 10, ids, 0, 0, self.count)


SHAPES = (
    Shape("digits 1x8x8, 9 points", (1, 8, 8), 9, 256, 16),
    Shape("3x32x32, 9 points", (3, 32, 32), 9, 256, 8),
    Shape("latents 4x32x32, 9 points", (4, 32, 32), 9, 512, 4),
    Shape("pairs 3x64x64, 2 points", (3, 64, 64), 2, 512, 4),
)


# -----------------------------------------------------------------------------------------------
# Shards


def seconds(work: Callable[[], None]) -> float:
    """Seconds that `work` takes, from a disk that has nothing left to write."""
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shard_rounds(shape: Shape, rounds: int, folder: Path) -> dict[str, Any]:
    """Speeds in bytes per second and ratios to plain webdataset, medians over rounds."""
    made = [shape.generated(shard) for shard in range(shape.shards)]
    taken: dict[str, list[float]] = {
        name: [] for name in ("write", "wds_write", "read", "wds_read")
    }
    for index in range(rounds):
        run, plain = RunDir(folder / f"{index}-ours"), folder / f"{index}-plain"
        plain.mkdir()
        taken["write"].append(seconds(lambda run=run: write_ours(shape, made, run)))
        taken["wds_write"].append(seconds(lambda plain=plain: write_plain(shape, made, plain)))
        taken["read"].append(seconds(lambda run=run: read_ours(shape, run)))
        taken["wds_read"].append(seconds(lambda plain=plain: read_plain(shape, plain)))
    size = shape.shards * tar_bytes(shape.spec)
    speeds = {f"{name}_bytes_per_s": size / median(values) for name, values in taken.items()}
    ratios = {
        f"{name}_ratio": median(
            plain / ours for plain, ours in zip(taken[f"wds_{name}"], taken[name], strict=True)
        )
        for name in ("write", "read")
    }
    return {"shape": shape.name, "bytes": size, "rounds": rounds, **ratios, **speeds}


def write_ours(shape: Shape, made: list[GeneratedShard], run: RunDir) -> None:
    """Commits the shards to a run."""
    for shard, generated in enumerate(made):
        write_shard(run, shape.spec, shard, generated, 1.0, "benchmark")


def write_plain(shape: Shape, made: list[GeneratedShard], folder: Path) -> None:
    """The same members by webdataset, which encodes them."""
    pattern = str(folder / "%08d.tar")
    with webdataset.ShardWriter(pattern, maxcount=shape.count, verbose=0) as writer:
        for generated in made:
            states = generated.states.half().numpy()
            for index, label, array in zip(
                generated.ids.tolist(), generated.labels.tolist(), states, strict=True
            ):
                meta = {"id": index, "label": label, "dtype": "float16"}
                sample = {"__key__": f"{index:012d}", "meta.json": meta, "states.npy": array}
                writer.write(sample)


def empty(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Room for the states and labels of a shard."""
    states = np.empty((shape.count, *shape.spec.sample_shape), dtype=stored_dtype(shape.spec))
    return states, np.empty(shape.count, dtype=np.int64)


def read_ours(shape: Shape, run: RunDir) -> None:
    """Reads every shard into one array, its sha256 checked."""
    states, labels = empty(shape)
    for shard in range(shape.shards):
        read_shard(run, shape.spec, shard, states, labels)


def read_plain(shape: Shape, folder: Path) -> None:
    """The same by webdataset."""
    states, labels = empty(shape)
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode()
    for index, sample in enumerate(dataset):
        states[index % shape.count] = sample["states.npy"]
        labels[index % shape.count] = sample["meta.json"]["label"]


# -----------------------------------------------------------------------------------------------
# Waiting


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
    stream = TrajectoryStream(run, spec, TrajectoryConfig(), order, 0, 1, [1.0])
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    producer = context.Process(target=produce, args=(shape, num_shards, root, ready))
    producer.start()
    ready.wait()
    began = time.perf_counter()
    stream.read(0)
    first_s = time.perf_counter() - began
    train(
        engine,
        stream.read,
        build_objective(EndpointConfig(), 0),
        config,
        run,
        origin={},
        wait_s=lambda: stream.wait_s,
        should_stop=lambda: False,
    )
    producer.join()
    stream.close()
    lines = list(read_lines(run.metrics))[1:]
    wall = sum(line["step_s"] * LOG_EVERY for line in lines)
    waited = sum(line["data_wait_fraction"] * line["step_s"] * LOG_EVERY for line in lines)
    return {
        "shape": shape.name,
        "student": student,
        "steps": steps,
        "blocks": order.num_blocks(steps),
        "step_s": wall / len(lines) / LOG_EVERY,
        "first_batch_s": first_s,
        "data_wait_fraction": waited / wall,
    }


# -----------------------------------------------------------------------------------------------
# Report


def page(result: dict[str, Any]) -> str:
    """Both tables, as Markdown."""
    shards = [
        [row["shape"]]
        + [f"{row[f'{name}_ratio']:.2f}" for name in ("write", "read")]
        + [f"{row[f'{name}_bytes_per_s'] / 1e6:.0f}" for name in ("write", "read")]
        for row in result["shards"]
    ]
    waits = [
        [
            row["shape"],
            row["student"],
            f"{row['step_s'] * 1000:.0f} ms",
            f"{row['blocks']}",
            f"{row['first_batch_s']:.2f} s",
            f"{row['data_wait_fraction']:.2%}",
        ]
        for row in result["waiting"]
    ]
    head = ["shards", "write, ours / plain", "read", "write MB/s", "read MB/s"]
    tables = (
        [head, *shards],
        [["shards", "student", "step", "blocks", "first batch", "data wait"], *waits],
    )
    return "\n\n".join(markdown(table) for table in tables) + "\n"


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Measures, prints, and writes the pages unless --quick."""
    parser = argparse.ArgumentParser(description="the stream against plain webdataset")
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    small = DiTConfig(patch_size=4, width=96, depth=4, num_heads=6)
    tiny = DiTConfig(patch_size=8, width=32, depth=1, num_heads=2)
    steps = 24 if quick else 64
    with tempfile.TemporaryDirectory(prefix="bowstring-") as name:
        folder = Path(name)
        shards = []
        for index, shape in enumerate(SHAPES):
            (folder / str(index)).mkdir()
            shards.append(shard_rounds(shape, 3 if quick else 9, folder / str(index)))
        waits = [
            waiting(SHAPES[0], "width 96, depth 4", small, steps, folder / "digits"),
            waiting(SHAPES[1], "width 96, depth 4", small, steps // 2, folder / "rgb"),
            waiting(SHAPES[1], "width 32, depth 1", tiny, 4 * steps, folder / "tiny"),
        ]
    result = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "webdataset": webdataset.__version__,
        "shapes": [asdict(shape) for shape in SHAPES],
        "shards": shards,
        "waiting": waits,
    }
    text = page(result)
    print(text)
    if quick:
        print(json.dumps(result))
        return
    out = ROOT / "docs" / "benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    (out / "stream.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "stream.md").write_text(f"# The stream\n\n`python benchmarks/stream.py`\n\n{text}")
    print(out / "stream.json", out / "stream.md", sep="\n")


if __name__ == "__main__":
    main()
