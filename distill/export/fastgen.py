"""Export of trajectories for NVIDIA FastGen's knowledge distillation (v0.2, `WDSLoader`).

Member of sample i, key `<id, 12 digits>`, all as torch tensors in the stored dtype:

    latent.pth   [C, H, W]             x_1, the best teacher's output
    noise.pth    [C, H, W]             x_0
    path.pth     [points - 1, C, H, W] its states from the noise on, without x_1
    label.pth    [classes] float32     the class one-hot, as its networks take it; zeros for "none"
    json         {"id", "label"}

FastGen's time runs from 1, noise, to 0: `path_timesteps` in index.json is 1 - t. It looks for them
there, since a loss trains quietly on the wrong times. shard_count.json is its `shard_count_file`.
"""

import io
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import console, progress
from webdataset.writer import TarWriter

from distill.config import check
from distill.data import layout, sidecar
from distill.data.shards import as_tensor, read_shard
from distill.data.stores.store import committed, read_sidecar
from distill.flow.noise import sample_noise
from distill.run import files, identity

INDEX, COUNTS = "index.json", "shard_count.json"


def export_fastgen(run: files.RunDir, out: Path, evicted: Collection[int] = ()) -> Path:
    """`out`, now with one shard for every committed one of the run, verified while it is read.

    Shards that are there already are kept: a name is given to a whole file only. What is left out
    is named: `evicted` are the shards that were deleted for room.

    Raises:
        ConfigError: the run has no shards, or `out` holds an export of another run.
        CorruptShard: a byte of a shard differs.
        OSError: a shard cannot be written. Nothing of it stays.
    """
    shards = list(committed(run))
    gone = sorted(set(evicted).difference(shards))
    check(
        len(shards) > 0,
        f"{run.root} has no shards any more: {len(gone)} were deleted for room; a run with a "
        "larger trajectory.max_bytes keeps them"
        if gone
        else f"{run.root} has no shards yet; `bowstring generate {run.root}` first",
    )
    spec = read_sidecar(run, shards[0]).spec
    classes = int(identity.record_of(run).identity["data"]["num_classes"])
    _claim(out, spec)
    files.clean_temporaries(out)
    missing = [shard for shard in shards if not _place(out, shard).exists()]
    screen = console.Console(stderr=True)
    absent = sorted(set(range(max([*shards, *gone]) + 1)) - {*shards, *gone})
    for left_out, why in ((gone, "deleted for room"), (absent, "set aside, or not made yet")):
        if left_out:
            screen.print(
                f"left out, since {why}: {len(left_out)} shards, {_ranges(left_out)}",
                highlight=False,
                soft_wrap=True,
            )
    with progress.Progress(console=screen, disable=not screen.is_terminal) as bar:
        for shard in bar.track(missing, description="export"):
            _export_shard(run, spec, shard, classes, _place(out, shard))
    counts = {path.name: spec.samples_per_shard for path in sorted(out.glob("*.tar"))}
    files.write_json(out / COUNTS, counts)
    return out


def _ranges(shards: list[int]) -> str:
    """Ascending numbers in words: "00000000 to 00000003, 00000007"."""
    runs: list[list[int]] = []
    for shard in shards:
        if runs and shard == runs[-1][-1] + 1:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return ", ".join(
        f"{run[0]:08d}" + (f" to {run[-1]:08d}" if len(run) > 1 else "") for run in runs
    )


def _place(out: Path, shard: int) -> Path:
    return out / f"{shard:08d}.tar"


def _claim(out: Path, spec: sidecar.ShardSpec) -> None:
    """Writes index.json, or compares it with the one there."""
    teacher = spec.teachers[-1]
    index = {
        "path_timesteps": [1 - t for t in spec.times[:-1]],
        "teacher": asdict(teacher),
        "spec": json.loads(json.dumps(asdict(spec))),
    }
    path = out / INDEX
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        check(
            found == index,
            f"{out} holds an export of other trajectories; name another folder with --out",
        )
        return
    check(
        not out.exists() or not any(out.glob("*.tar")),
        f"{out} holds shards that are no export; name another folder with --out",
    )
    files.write_json(path, index)


def _export_shard(
    run: files.RunDir, spec: sidecar.ShardSpec, shard: int, classes: int, place: Path
) -> None:
    """Writes one shard under a temporary name and gives it its own once it is on disk."""
    temporary = files.temporary_path(place)
    try:
        with temporary.open("xb") as file:
            writer = TarWriter(file, encoder=False, compress=False, mtime=0, user="bowstring")
            for sample in _samples(run, spec, shard, classes):
                writer.write(sample)
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    files.sync_directory(place.parent)


def _samples(
    run: files.RunDir, spec: sidecar.ShardSpec, shard: int, classes: int
) -> Iterator[dict[str, Any]]:
    """The members of every sample of a shard."""
    stored = np.empty((spec.samples_per_shard, *spec.sample_shape), dtype=layout.stored_dtype(spec))
    labels = np.empty(spec.samples_per_shard, dtype=np.int64)
    read_shard(run, spec, shard, stored, labels)
    paths = as_tensor(spec, stored)[:, -1, : spec.num_states]
    if not spec.store_noise:
        noise = sample_noise(spec.seed, np.array(spec.ids(shard)), spec.image)
        paths = torch.cat([torch.from_numpy(noise).to(paths.dtype)[:, None], paths], dim=1)
    for index, label, path in zip(spec.ids(shard), labels.tolist(), paths, strict=True):
        sample = {
            "__key__": f"{index:012d}",
            "json": json.dumps({"id": index, "label": label}).encode(),
            "latent.pth": _saved(path[-1]),
            "noise.pth": _saved(path[0]),
            "path.pth": _saved(path[:-1]),
        }
        if classes > 0:
            one_hot = torch.zeros(classes)
            if label >= 0:
                one_hot[label] = 1
            sample["label.pth"] = _saved(one_hot)
        yield sample


def _saved(tensor: torch.Tensor) -> bytes:
    """What torch.load(weights_only=True) takes. A copy: a view would be saved with all it views."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return buffer.getvalue()
