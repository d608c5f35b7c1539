"""The ledger of trajectory shards: the set of sidecars in `shards/`. No torch, no webdataset.

    shards/00000017.tar    the samples          published first, complete and flushed to disk
    shards/00000017.json   its sidecar          published second: now the shard is committed

A shard is committed when both names exist. The sidecar holds the size and sha256 of the tar and of
itself, so every byte of both can be proven. Names that start with a dot are in the making or left
by a killed process; no reader looks at them. `distill.publish` makes the changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distill.config import ConfigError, ImageSpec, TeacherConfig, TrajectoryConfig
from distill.manifest import sha256_file
from distill.rundir import RunDir

FORMAT = 1
SHARD_NAME = re.compile(r"\d{8,}")


class CorruptShard(RuntimeError):
    """A shard whose bytes are not those that were committed. The message says which and how."""


class MisplacedShard(CorruptShard):
    """A sound sidecar under the name of another shard."""

    def __init__(self, message: str, sidecar: Sidecar) -> None:
        super().__init__(message)
        self.sidecar = sidecar


class ForeignShard(ConfigError):
    """A sound shard of another grid, teacher or seed. It is refused, not set aside."""


# -----------------------------------------------------------------------------------------------
# What shards say of themselves


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher and how its ODE was solved."""

    name: str
    fingerprint: str  # sha256 of the weights
    solver: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class ShardSpec:
    """What every shard of a run has in common; with the shard's number it determines its content.

    Attributes:
        seed: the run's seed.
        times: of the stored states, from 0 to 1.
        dtype: "float16", "bfloat16" or "float32", as stored (`distill.layout`).
        store_noise: whether state 0 is stored. If not, the reader makes it from the sample id, in
            float32, so without the rounding of the stored dtype.
        image: (C, H, W).
        samples_per_shard: number of consecutive ids in a shard.
        teachers: weakest first.
    """

    seed: int
    times: tuple[float, ...]
    dtype: str
    store_noise: bool
    image: tuple[int, int, int]
    samples_per_shard: int
    teachers: tuple[TeacherSpec, ...]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample's stored states: (M, points, C, H, W), the noise only if stored."""
        points = len(self.times) - (0 if self.store_noise else 1)
        return (len(self.teachers), points, *self.image)

    def ids(self, shard: int) -> range:
        """The sample ids of a shard."""
        return range(shard * self.samples_per_shard, (shard + 1) * self.samples_per_shard)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> ShardSpec:
        """The spec in a sidecar; KeyError or TypeError when it is none."""
        values = {field.name: tree[field.name] for field in fields(ShardSpec)}
        channels, height, width = values["image"]
        return ShardSpec(
            **{
                **values,
                "times": tuple(values["times"]),
                "image": (channels, height, width),
                "teachers": tuple(TeacherSpec(**teacher) for teacher in values["teachers"]),
            }
        )

    def difference(self, other: ShardSpec) -> str:
        """How `other` differs from this: "times: [0.0, 1.0] instead of [0.0, 0.5, 1.0], .."."""
        ours, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name}: {json.dumps(theirs[name])} instead of {json.dumps(ours[name])}"
            for name in ours
            if ours[name] != theirs[name]
        )


def shard_spec(
    seed: int,
    image: ImageSpec,
    trajectory: TrajectoryConfig,
    teachers: dict[str, TeacherConfig],
    fingerprints: dict[str, str],
) -> ShardSpec:
    """The spec of a run's shards. `fingerprints` holds the sha256 of every teacher's weights."""
    return ShardSpec(
        seed=seed,
        times=tuple(k / trajectory.grid for k in trajectory.points),
        dtype=trajectory.dtype,
        store_noise=trajectory.store_noise,
        image=image.shape,
        samples_per_shard=trajectory.samples_per_shard,
        teachers=tuple(
            TeacherSpec(name, fingerprints[name], t.solver, t.steps, t.guidance)
            for name, t in teachers.items()
        ),
    )


@dataclass(frozen=True)
class Sidecar:
    """The record of one shard.

    Attributes:
        shard: its number; it holds the ids of `spec.ids(shard)`, in order.
        spec: what it shares with the other shards of the run.
        num_bytes, sha256: of the tar.
        labels: class of each sample, -1 for "none".
        offsets: where the content of each sample's states.npy starts in the tar.
        member_bytes: its length, the same for every sample.
        nfe: evaluations of the guided velocity, summed over samples and teachers.
        forwards: samples that went through a network.
        seconds: time it took to make.
        producer: who made it.
    """

    shard: int
    spec: ShardSpec
    num_bytes: int
    sha256: str
    labels: tuple[int, ...]
    offsets: tuple[int, ...]
    member_bytes: int
    nfe: int
    forwards: int
    seconds: float
    producer: str

    @property
    def ids(self) -> range:
        """Sample ids."""
        return self.spec.ids(self.shard)

    def to_bytes(self) -> bytes:
        """The file's content: one JSON object, its own sha256 included."""
        tree = {"format": FORMAT, **asdict(self)}
        tree["bytes"] = tree.pop("num_bytes")
        tree |= {"count": len(self.ids), "first_id": self.ids[0], "last_id": self.ids[-1]}
        tree["sidecar_sha256"] = _tree_hash(tree)
        return (json.dumps(tree) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> Sidecar:
        """The sidecar in a file's content.

        Raises:
            ValueError, KeyError, TypeError: it is none, or not one byte for byte.
        """
        tree = json.loads(data)
        if tree.pop("sidecar_sha256") != _tree_hash(tree):
            raise ValueError("its own sha256 does not match")
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']} is not known")
        values = {f.name: tree[f.name] for f in fields(Sidecar) if f.name != "num_bytes"}
        values |= {"num_bytes": tree["bytes"], "spec": ShardSpec.from_json(tree["spec"])}
        values |= {"labels": tuple(tree["labels"]), "offsets": tuple(tree["offsets"])}
        found = Sidecar(**values)
        ends = [offset + found.member_bytes for offset in found.offsets]
        if not len(found.ids) == len(found.labels) == len(ends) or max(ends) > found.num_bytes:
            raise ValueError("its index does not fit its size and count")
        return found


def _tree_hash(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------------------------
# Reading the ledger


def tar_path(run: RunDir, shard: int) -> Path:
    """The tar of a shard."""
    return run.shards / f"{shard:08d}.tar"


def sidecar_path(run: RunDir, shard: int) -> Path:
    """The sidecar of a shard."""
    return run.shards / f"{shard:08d}.json"


def committed(run: RunDir) -> dict[int, int]:
    """Bytes of the tar of every committed shard, by number. Looks at names and sizes only."""
    sizes: dict[int, int] = {}
    sidecars: set[int] = set()
    if run.shards.is_dir():
        with os.scandir(run.shards) as entries:
            for entry in entries:
                stem, _, kind = entry.name.partition(".")
                if not SHARD_NAME.fullmatch(stem):
                    continue
                if kind == "json":
                    sidecars.add(int(stem))
                elif kind == "tar":
                    try:
                        sizes[int(stem)] = entry.stat().st_size
                    except FileNotFoundError:  # quarantined meanwhile
                        continue
    return {shard: sizes[shard] for shard in sorted(sizes.keys() & sidecars)}


def is_committed(run: RunDir, shard: int) -> bool:
    """Whether a shard is committed."""
    return sidecar_path(run, shard).exists() and tar_path(run, shard).exists()


def read_sidecar(run: RunDir, shard: int) -> Sidecar:
    """The sidecar of a committed shard.

    Raises:
        FileNotFoundError: there is none.
        CorruptShard: it is not what was written.
    """
    path = sidecar_path(run, shard)
    try:
        sidecar = Sidecar.from_bytes(path.read_bytes())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(f"{path}: {error}") from error
    if sidecar.shard != shard:
        raise MisplacedShard(f"{path}: it is the sidecar of shard {sidecar.shard}", sidecar)
    return sidecar


def check_size(run: RunDir, sidecar: Sidecar, num_bytes: int) -> None:
    """Raises CorruptShard unless `num_bytes` is the size the tar was committed with."""
    if num_bytes != sidecar.num_bytes:
        raise CorruptShard(
            f"{tar_path(run, sidecar.shard)}: {num_bytes} bytes instead of {sidecar.num_bytes}"
        )


def check_spec(run: RunDir, sidecar: Sidecar, spec: ShardSpec) -> None:
    """Raises ForeignShard unless a shard was made for `spec`."""
    if sidecar.spec != spec:
        raise ForeignShard(
            f"{tar_path(run, sidecar.shard)} was made for another run "
            f"({spec.difference(sidecar.spec)}); it is left as it is and not trained on. Move "
            "foreign shards out of the folder, or take another run.name"
        )


def verify_shard(run: RunDir, shard: int) -> Sidecar:
    """The sidecar of a shard after every byte of it and of its tar was checked.

    Raises:
        FileNotFoundError: the shard is not there.
        CorruptShard: a byte differs.
    """
    sidecar = read_sidecar(run, shard)
    path = tar_path(run, shard)
    check_size(run, sidecar, path.stat().st_size)
    if sha256_file(path) != sidecar.sha256:
        raise CorruptShard(f"{path}: sha256 differs from the sidecar")
    return sidecar
