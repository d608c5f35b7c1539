"""Shards against plain webdataset: the same samples written and read by both.

`distill.data.shards` writes with sha256, flushed to disk, sidecar, atomic names; ShardWriter of
webdataset with none of these. Both read whole shards into one array; ours checks the sha256. Rounds
alternate; what counts is the median of the ratios.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.sections import markdown
from distill.data.layout import stored_dtype, tar_bytes
from distill.data.shards import read_shard, write_shard
from distill.data.sidecar import ShardSpec, TeacherSpec
from distill.flow.trajectory import GeneratedShard
from distill.run.files import RunDir


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
# The section


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """A row for every shape."""
    rows = []
    for index, shape in enumerate(SHAPES):
        (folder / str(index)).mkdir()
        rows.append(shard_rounds(shape, 3 if quick else 9, folder / str(index)))
    shapes = [asdict(shape) for shape in SHAPES]
    return {"webdataset": webdataset.__version__, "shapes": shapes, "rows": rows}


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [
        [row["shape"]]
        + [f"{row[f'{name}_ratio']:.2f}" for name in ("write", "read")]
        + [f"{row[f'{name}_bytes_per_s'] / 1e6:.0f}" for name in ("write", "read")]
        for row in found["rows"]
    ]
    head = ["shards", "write, ours / plain", "read", "write MB/s", "read MB/s"]
    text = (
        f"webdataset {found['webdataset']}; medians of {found['rows'][0]['rounds']} alternating "
        "rounds. Bars: write 0.80, read 1.00."
    )
    return f"{markdown([head, *rows])}\n\n{text}"
