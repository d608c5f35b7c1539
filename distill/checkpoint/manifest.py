"""Which checkpoints exist and whether they are whole. Standard library only, so it needs no torch.

    checkpoints/step_00001000/MANIFEST.json           names every file with its size and sha256
    checkpoints/step_00001000/rank_00000.safetensors  pieces of named tensors
    checkpoints/latest                                name of the newest one, for people
    checkpoints/kept/step_00001000/                   kept for good; no run goes on from it

A folder without a whole manifest is not a checkpoint, whatever its name.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from distill.config import ConfigError
from distill.run import files, records

FORMAT = 1
MANIFEST = "MANIFEST.json"
SEAL = "manifest_sha256"  # key of the hash of all others; old manifests have none
LATEST = "latest"
KEPT = "kept"
STEP_PATTERN = re.compile(r"step_(\d{8,})")
READERS = 8  # files that are read at the same time; one core hashes about a gigabyte a second

# (size, mtime in ns, inode) of the manifest and of every file it names
Signature = list[tuple[int, int, int]]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be opened. The message says which and why."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written. The message says which rank could not, and why.

    No CheckpointError: those before it are as good as ever, and another try may succeed.
    """


@dataclass(frozen=True)
class File:
    """A file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, and every file of it by name."""

    format: int
    step: int  # steps done; also the position in the data
    world_size: int  # ranks that wrote it
    engine: str  # "torch" or "deepspeed"
    zero_stage: int  # 0 to 3, of the ranks that wrote it; any stage opens it
    precision: str  # "fp32", "bf16" or "fp16"; what is stored is float32
    averages: dict[str, float]  # decay of every weight average
    parameters: dict[str, tuple[int, ...]]  # shape of every trained parameter
    # Shape of every tensor of the network beside them; None: an older version did not store those.
    fixed: dict[str, tuple[int, ...]] | None = None
    rng: str  # "counter-based": all randomness is a function of seed and step
    seed: int | None = None  # of the run
    config_hash: str | None = None  # `hash` of run.json
    versions: dict[str, str]  # of the packages that make the numbers
    files: dict[str, File] = field(default_factory=dict)


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """File name of what a rank has saved."""
    return f"rank_{rank:05d}.safetensors"


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """Folders that were renamed into place, by step, oldest first. Not verified."""
    if not checkpoints.is_dir():
        return {}
    found = {}
    for path in files.patiently(lambda: list(checkpoints.iterdir())):
        match = STEP_PATTERN.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def all_steps(checkpoints: Path) -> list[int]:
    """Steps of all folders there, those kept for good too, oldest first. Not verified."""
    return sorted({*committed_steps(checkpoints), *committed_steps(checkpoints / KEPT)})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a checkpoint, with the sha256 of itself."""
    tree = records.tree_of(manifest)
    files.write_json(folder / MANIFEST, tree | {SEAL: records.tree_sha256(tree)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, torn, changed, or lacks something.
        ConfigError: a newer version wrote it, whole. To fall back behind it would train its steps
            again.
    """
    path, is_sealed = folder / MANIFEST, False
    try:
        tree = files.patiently(lambda: records.parse_json(path.read_bytes()), records.RecordError)
        if isinstance(tree, dict) and (seal := tree.pop(SEAL, None)) is not None:
            is_sealed = seal == records.tree_sha256(tree)
            if not is_sealed:
                raise records.RecordError("does not have the sha256 that it names")
        if isinstance(tree, dict) and tree.get("format", FORMAT) != FORMAT:
            raise records.NewerRecord(f"has format {tree['format']}, not {FORMAT}")
        return records.record_of(Manifest, tree)
    except (OSError, records.RecordError) as error:
        if is_sealed and isinstance(error, records.NewerRecord):
            raise ConfigError(
                f"{path} {error}; a newer version of Bowstring wrote it, so go on with that one"
            ) from error
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({error})") from error


def foreign(manifest: Manifest, origin: dict[str, Any]) -> str:
    """Why a checkpoint is not of the run of `origin`, its `seed` and `config_hash`; "" if it is.

    A manifest that does not say is of any run.
    """
    for key, ours in origin.items():
        theirs = getattr(manifest, key)
        if theirs is not None and theirs != ours:
            return f"it is of another run: its {key} is {theirs}, not {ours}; move it away"
    return ""


def verify(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Everything wrong with a checkpoint; empty when every byte is as its manifest says.

    Of several parts only files number `part`, `part + parts`, .. by name are read.

    Raises:
        ConfigError: a newer version wrote it.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    if folder.name != step_name(manifest.step):
        problems.append(f"{folder}: the manifest is of step {manifest.step}")
    if sorted(manifest.files) != [rank_file(rank) for rank in range(manifest.world_size)]:
        return [*problems, f"{folder}: the manifest does not name a file for each rank"]
    entries = sorted(manifest.files.items())[part::parts]
    with ThreadPoolExecutor(READERS) as pool:  # hashing releases the interpreter
        found = pool.map(lambda entry: _problem(folder / entry[0], entry[1]), entries)
        return problems + [problem for problem in found if problem]


def _problem(path: Path, entry: File) -> str:
    """What is wrong with a file, "" when nothing is."""
    try:
        size = files.patiently(path.stat).st_size
        if size != entry.bytes:
            return f"{path}: {size} bytes instead of {entry.bytes}"
        if files.sha256_file(path) != entry.sha256:
            return f"{path}: sha256 differs from the manifest"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


_whole: dict[Path, Signature] = {}  # what `verify_once` found whole, as it looked then


def verify_once(folder: Path) -> list[str]:
    """Like `verify`, without reading again what this process found whole and nobody touched since.

    For a supervisor, which asks at every start of its ranks. What rots on the disk without a write
    is not seen again here; the ranks read before they load.
    """
    before = _signature(folder)
    if before and _whole.get(folder.absolute()) == before:
        return []
    problems = verify(folder)
    if not problems:
        for known in list(_whole):  # those that were deleted since
            if not known.is_dir():
                _whole.pop(known, None)
        _whole[folder.absolute()] = before
    return problems


def _signature(folder: Path) -> Signature:
    """How the files of a checkpoint look from outside; empty when one of them is missing."""
    try:
        names = [MANIFEST, *sorted(read_manifest(folder).files)]
        stats = [os.stat(folder / name) for name in names]
    except (CheckpointError, OSError):
        return []
    return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats]


def latest_verified(checkpoints: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that verifies (`verify_once`), or None when there is none at all.

    Raises:
        CheckpointError: checkpoints exist and none verifies. A run never starts again silently.
    """
    problems: list[str] = []
    for step, folder in reversed(committed_steps(checkpoints).items()):
        found = verify_once(folder)
        if not found:
            return step, folder
        problems += found
    if problems:
        refuse(problems)
    check_none_kept(checkpoints)
    return None


def refuse(problems: list[str]) -> NoReturn:
    """Raises CheckpointError: of the checkpoints that exist, each has a problem."""
    raise CheckpointError(
        "no checkpoint can be opened; move them away to start again: " + "; ".join(problems)
    )


def check_none_kept(checkpoints: Path) -> None:
    """Raises CheckpointError when the only checkpoints are those kept for good."""
    if committed_steps(checkpoints / KEPT):
        raise CheckpointError(
            f"{checkpoints} holds only those in {KEPT}; move one of them up to go on from it, or "
            "all of them away to start again"
        )
