"""Checkpoint commit and load: staging -> manifest -> rename -> pointer.

Every rank writes the pieces of the state it holds (`engine.Fragment`) to one safetensors file.
Pieces are of named tensors, so a checkpoint opens at any world size: each rank reads the ranges it
needs, without a conversion. `distill.manifest` says which checkpoints are whole.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from distill.engine import Engine, FragmentReader, Peers, average_kind
from distill.manifest import (
    KEPT,
    LATEST,
    MANIFEST,
    CheckpointError,
    committed_steps,
    latest_verified,
    read_manifest,
    step_name,
    verify,
)
from distill.rundir import sync_directory, write_atomic, write_json

FORMAT = 1
SEPARATOR = "|"  # between kind, parameter name and start in a tensor's key


# -----------------------------------------------------------------------------------------------
# Save


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of the state after `step` steps, in host memory.

    Attributes:
        step: steps done.
        about: what the manifest says, but for the files.
        tensors: the pieces, by key.
    """

    step: int
    about: dict[str, Any]
    tensors: dict[str, Tensor]


def take_snapshot(step: int, engine: Engine, origin: dict[str, Any]) -> Snapshot:
    """A copy of the state that this rank holds.

    `origin` goes into the manifest: the seed and the hash of the run's settings.
    """
    about = {
        "format": FORMAT,
        "step": step,
        "world_size": engine.world_size,
        **engine.describe(),
        "rng": "counter-based",  # all randomness is a function of seed and step
        **origin,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
    }
    tensors = {
        SEPARATOR.join((f.kind, f.name, str(f.start))): f.data.detach().to("cpu", copy=True)
        for f in engine.fragments()
    }
    return Snapshot(step, about, tensors)


def commit(
    checkpoints: Path, snapshot: Snapshot, ranks: Peers, keep_last: int, keep_every: int = 0
) -> int:
    """Bytes of the checkpoint that is there now. Collective: all ranks call it.

    Raises:
        CheckpointError: on every rank, when any rank failed. Nothing half-written stays.
    """
    nonce = int(ranks.gather(torch.tensor(uuid.uuid4().int % 2**62))[0])
    final = checkpoints / step_name(snapshot.step)
    staging = final.with_name(f"{final.name}.tmp-{nonce:016x}")
    digest, size, failure = b"\0" * 32, 0, ""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        data = to_bytes(snapshot.tensors)
        write_atomic(staging / _rank_file(ranks.rank), data)
        digest, size = hashlib.sha256(data).digest(), len(data)
    except OSError as error:
        failure = f"rank {ranks.rank} could not write {staging}: {error}"
    _raise_together(ranks, failure, staging)

    digests = ranks.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    sizes = ranks.gather(torch.tensor(size))
    if ranks.rank == 0:
        files = {
            _rank_file(rank): {"bytes": int(sizes[rank]), "sha256": bytes(digests[rank]).hex()}
            for rank in range(ranks.world_size)
        }
        try:
            write_json(staging / MANIFEST, {**snapshot.about, "files": files})
            _publish(staging, final)
            _retain(checkpoints, keep_last, keep_every)
        except OSError as error:
            failure = f"rank 0 could not commit {final}: {error}"
    _raise_together(ranks, failure, staging)
    return int(sizes.sum())


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _publish(staging: Path, final: Path) -> None:
    """Renames the staged folder into place and moves the pointer."""
    if final.exists():  # the run fell back behind this step and came here again
        if verify(final):
            final.rename(final.with_name(f"{final.name}.bad-{uuid.uuid4().hex[:8]}"))
        else:
            shutil.rmtree(staging)
    if staging.exists():
        sync_directory(staging)
        staging.rename(final)
    sync_directory(final.parent)
    write_atomic(final.parent / LATEST, f"{final.name}\n".encode())


def _retain(checkpoints: Path, keep_last: int, keep_every: int) -> None:
    """Takes away all but the newest `keep_last` once the newest verifies, and stale staging.

    Multiples of `keep_every` move to the folder KEPT, the others are deleted.
    """
    newest_first = list(reversed(committed_steps(checkpoints).items()))
    if not newest_first or verify(newest_first[0][1]):
        return
    for step, folder in newest_first[keep_last:]:
        if keep_every and step % keep_every == 0:
            kept = checkpoints / KEPT / folder.name
            kept.parent.mkdir(exist_ok=True)
            if kept.exists():  # from before the run fell back behind this step
                _delete(kept, checkpoints)
            folder.rename(kept)
        else:
            _delete(folder, checkpoints)
    for folder in checkpoints.glob("step_*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for pointer in checkpoints.glob(f".{LATEST}.tmp-*"):
        pointer.unlink(missing_ok=True)


def _delete(folder: Path, checkpoints: Path) -> None:
    # A half-deleted folder must not look like a checkpoint.
    doomed = checkpoints / f"{folder.name}.tmp-deleted-{uuid.uuid4().hex[:8]}"
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # the next save tries again


def _raise_together(ranks: Peers, failure: str, staging: Path) -> None:
    """Raises CheckpointError on all ranks when `failure` is not empty on any."""
    if ranks.any(bool(failure)):
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(failure or "another rank could not write its part of the checkpoint")


# -----------------------------------------------------------------------------------------------
# Load


def load_latest(checkpoints: Path, engine: Engine) -> int:
    """Steps done: loads the newest checkpoint that verifies into the engine; 0 when there is none.

    Collective. Rank 0 verifies and decides for all.

    Raises:
        CheckpointError: checkpoints exist and none verifies, or it is of another network.
    """
    step, failure = 0, ""
    if engine.rank == 0:
        try:
            found = latest_verified(checkpoints)
            step = found[0] if found else 0
        except CheckpointError as error:
            failure = str(error)
    if engine.any(bool(failure)):
        raise CheckpointError(failure or "rank 0 found no checkpoint that verifies")
    step = int(engine.gather(torch.tensor(step))[0])
    if step > 0:
        folder = checkpoints / step_name(step)
        ours, theirs = engine.describe()["parameters"], read_manifest(folder)["parameters"]
        if ours != theirs:
            raise CheckpointError(f"{folder}: its parameters are not those of this network")
        engine.load(fragment_reader(folder), step)
    return step


def fragment_reader(folder: Path) -> FragmentReader:
    """A reader of any range of any tensor of a verified checkpoint, whatever wrote it."""
    pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
    for name in read_manifest(folder)["files"]:
        file = safe_open(folder / name, framework="pt")
        for key in file.keys():  # noqa: SIM118 - not a mapping
            kind, parameter, start = key.split(SEPARATOR)
            length = file.get_slice(key).get_shape()[0]
            pieces[kind, parameter].append((int(start), length, file, key))

    def read(kind: str, name: str, start: int, length: int) -> Tensor:
        out, filled = torch.empty(length), 0
        for piece_start, piece_length, file, key in pieces[kind, name]:
            low = max(start, piece_start)
            high = min(start + length, piece_start + piece_length)
            if low < high:
                part = file.get_slice(key)[low - piece_start : high - piece_start]
                out[low - start : high - start] = part
                filled += high - low
        if filled != length:
            raise CheckpointError(
                f"{folder}: {kind} of {name} has {filled} of the {length} values asked for"
            )
        return out

    return read


def read_average(folder: Path, name: str) -> dict[str, Tensor]:
    """Trained parameters of a weight average ("target" or "evaluation"), float32, by name."""
    read = fragment_reader(folder)
    shapes = read_manifest(folder)["parameters"]
    kind = average_kind(name)
    return {
        parameter: read(kind, parameter, 0, torch.Size(shape).numel()).reshape(shape)
        for parameter, shape in shapes.items()
    }
