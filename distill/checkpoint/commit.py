"""Checkpoint commit and load: staging -> manifest -> rename -> pointer -> verified -> retention.

Every rank writes the pieces of the state it holds (`engine.Fragment`) to one safetensors file.
Pieces are of named tensors, so a checkpoint opens at any world size: each rank reads the ranges it
needs, without a conversion. `distill.checkpoint.manifest` says which checkpoints are whole,
`distill.checkpoint.agree` how ranks share the reading that takes.
"""

import hashlib
import logging
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from distill.checkpoint import agree, manifest
from distill.engine.engine import Engine, FragmentReader, Peers, average_kind
from distill.run import files, records

logger = logging.getLogger(__name__)

SEPARATOR = "|"  # between kind, parameter name and start in a tensor's key
FIXED = "fixed"  # kind of what is not trained; rank 0 has it, in its own dtype


# -----------------------------------------------------------------------------------------------
# Save


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of the state after `step` steps, in host memory.

    Attributes:
        about: the manifest without the files.
        tensors: the pieces, by key.
    """

    about: manifest.Manifest
    tensors: dict[str, torch.Tensor]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.about.step


def take_snapshot(step: int, engine: Engine, origin: dict[str, Any]) -> Snapshot:
    """A copy of the state that this rank holds.

    `origin` goes into the manifest: the seed and the hash of the run's settings.
    """
    about = manifest.Manifest(
        format=manifest.FORMAT,
        step=step,
        world_size=engine.world_size,
        fixed={name: tuple(value.shape) for name, value in engine.fixed.items()},
        rng="counter-based",
        versions={name: version(name) for name in ("torch", "deepspeed", "safetensors")},
        **engine.describe(),
        **origin,
    )
    tensors = {
        SEPARATOR.join((f.kind, f.name, str(f.start))): f.data.detach().to("cpu", copy=True)
        for f in engine.fragments()
    }
    if engine.rank == 0:
        for name, value in engine.fixed.items():
            tensors[SEPARATOR.join((FIXED, name, "0"))] = value.flatten()
    return Snapshot(about, tensors)


def commit(
    checkpoints: Path, snapshot: Snapshot, ranks: Peers, keep_last: int, keep_every: int = 0
) -> int:
    """Bytes of the checkpoint that is there now. Collective: all ranks call it.

    Older ones go once the new one verifies. Where they cannot, or where it does not, they stay, a
    warning says so, and the next save tries again: the new one is there.

    Raises:
        SaveError: on every rank, when any rank failed, with its reason. Nothing half-written stays.
    """
    nonce = int(ranks.gather(torch.tensor(uuid.uuid4().int % 2**62))[0])
    final = checkpoints / manifest.step_name(snapshot.step)
    staging = final.with_name(f"{final.name}.tmp-{nonce:016x}")
    digest, size, failure = b"\0" * 32, 0, ""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save(snapshot.tensors)
        files.write_atomic(staging / _rank_file(ranks.rank), data)
        digest, size = hashlib.sha256(data).digest(), len(data)
    except OSError as error:
        failure = f"rank {ranks.rank} could not write {staging}: {error}"
    _end_together(ranks, failure, staging)

    digests = ranks.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    sizes = ranks.gather(torch.tensor(size))
    # The run may have fallen back behind this step and come here again.
    is_there = ranks.any(ranks.rank == 0 and final.exists())
    is_whole = is_there and not agree.verify_together(final, ranks)
    if ranks.rank == 0:
        entries = {
            _rank_file(rank): manifest.File(int(sizes[rank]), bytes(digests[rank]).hex())
            for rank in range(ranks.world_size)
        }
        try:
            if is_whole:
                shutil.rmtree(staging)
            else:
                files.write_json(
                    staging / manifest.MANIFEST,
                    records.tree_of(replace(snapshot.about, files=entries)),
                )
                _publish(staging, final)
        except OSError as error:
            failure = f"rank 0 could not commit {final}: {error}"
    _end_together(ranks, failure, staging)

    problems = [] if is_whole else agree.verify_together(final, ranks)
    if ranks.rank == 0 and problems:
        logger.warning("no older checkpoint goes, since the new one is bad: %s", problems)
    elif ranks.rank == 0:
        with _only_warning(f"{checkpoints} could not be tidied up"):
            _retain(checkpoints, snapshot.step, keep_last, keep_every)
    return int(sizes.sum())


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _publish(staging: Path, final: Path) -> None:
    """Renames the staged folder into place and moves the pointer."""
    if final.exists():  # it does not verify
        final.rename(final.with_name(f"{final.name}.bad-{uuid.uuid4().hex[:8]}"))
    files.sync_directory(staging)
    staging.rename(final)
    files.sync_directory(final.parent)
    with _only_warning(f"{final.parent / manifest.LATEST} names an older checkpoint now"):
        files.write_atomic(final.parent / manifest.LATEST, f"{final.name}\n".encode())


def _retain(checkpoints: Path, verified: int, keep_last: int, keep_every: int) -> None:
    """Takes away all but the newest `keep_last` up to step `verified`, and stale staging.

    Newer ones did not verify at the start, so they do not count, and stay until training comes to
    their step. Multiples of `keep_every` move to the folder KEPT, the others are deleted.
    """
    there = [
        (step, f) for step, f in manifest.committed_steps(checkpoints).items() if step <= verified
    ]
    for step, folder in there[::-1][keep_last:]:
        with _only_warning(f"{folder} could not be taken away"):
            if keep_every and step % keep_every == 0:
                _keep(folder, checkpoints)
            else:
                _delete(folder, checkpoints)
    for folder in checkpoints.glob("step_*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for pointer in checkpoints.glob(f".{manifest.LATEST}.tmp-*"):
        pointer.unlink(missing_ok=True)


def _keep(folder: Path, checkpoints: Path) -> None:
    kept = checkpoints / manifest.KEPT / folder.name
    kept.parent.mkdir(exist_ok=True)
    if kept.exists():  # from before the run fell back behind this step
        _delete(kept, checkpoints)
    folder.rename(kept)


def _delete(folder: Path, checkpoints: Path) -> None:
    # A half-deleted folder must not look like a checkpoint.
    doomed = checkpoints / f"{folder.name}.tmp-deleted-{uuid.uuid4().hex[:8]}"
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # the next save tries again


@contextmanager
def _only_warning(what: str) -> Iterator[None]:
    """Errors of the file system in here end no training: the new checkpoint is there."""
    try:
        yield
    except OSError as error:
        logger.warning("%s, and the next save tries again: %s", what, error)


def _end_together(ranks: Peers, failure: str, staging: Path) -> None:
    """Raises SaveError on all ranks when `failure` is not empty on any; nothing staged stays."""
    try:
        agree.raise_together(ranks, failure, manifest.SaveError)
    except manifest.SaveError:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


# -----------------------------------------------------------------------------------------------
# Load


def load_latest(checkpoints: Path, engine: Engine) -> int:
    """Steps done: loads the newest checkpoint that verifies into the engine; 0 when there is none.

    Collective.

    Raises:
        CheckpointError: on every rank: checkpoints exist and none verifies, or it is of another
            network.
    """
    step = agree.agreed_latest(checkpoints, engine)
    load_verified(checkpoints, step, engine)
    return step


def load_verified(checkpoints: Path, step: int, engine: Engine) -> None:
    """Loads the checkpoint of `step`, which `agreed_latest` has verified; none when `step` is 0.

    Raises:
        CheckpointError: on every rank: it is of another network.
    """
    if step == 0:
        return
    folder = checkpoints / manifest.step_name(step)
    if engine.describe()["parameters"] != manifest.read_manifest(folder).parameters:
        raise manifest.CheckpointError(f"{folder}: its parameters are not those of this network")
    engine.load(fragment_reader(folder), step)


def fragment_reader(folder: Path) -> FragmentReader:
    """A reader of any range of any tensor of a verified checkpoint, whatever wrote it."""
    pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
    for name in manifest.read_manifest(folder).files:
        file = safetensors.safe_open(folder / name, framework="pt")
        for key in file.keys():  # noqa: SIM118 - not a mapping
            kind, parameter, start = key.split(SEPARATOR)
            length = file.get_slice(key).get_shape()[0]
            pieces[kind, parameter].append((int(start), length, file, key))

    def read(kind: str, name: str, start: int, length: int) -> torch.Tensor:
        out, filled = torch.empty(length), 0
        for piece_start, piece_length, file, key in pieces[kind, name]:
            low = max(start, piece_start)
            high = min(start + length, piece_start + piece_length)
            if low < high:
                part = file.get_slice(key)[low - piece_start : high - piece_start]
                out[low - start : high - start] = part
                filled += high - low
        if filled != length:
            raise manifest.CheckpointError(
                f"{folder}: {kind} of {name} has {filled} of the {length} values asked for"
            )
        return out

    return read


def read_average(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Trained parameters of a weight average ("target" or "evaluation"), float32, by name."""
    read = fragment_reader(folder)
    shapes = manifest.read_manifest(folder).parameters
    kind = average_kind(name)
    return {
        parameter: read(kind, parameter, 0, torch.Size(shape).numel()).reshape(shape)
        for parameter, shape in shapes.items()
    }


def read_fixed(folder: Path) -> dict[str, torch.Tensor] | None:
    """Tensors of the network that are not trained, by name; None when an older version saved it."""
    shapes = manifest.read_manifest(folder).fixed
    if not shapes:
        return None if shapes is None else {}
    with safetensors.safe_open(folder / _rank_file(0), framework="pt") as file:
        return {
            name: file.get_tensor(SEPARATOR.join((FIXED, name, "0"))).reshape(shape)
            for name, shape in shapes.items()
        }
