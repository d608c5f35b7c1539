"""Which checkpoints exist and whether they are whole. Standard library only, so it needs no torch.

    checkpoints/step_00001000/MANIFEST.json           names every file with its size and sha256
    checkpoints/step_00001000/rank_00000.safetensors  pieces of named tensors
    checkpoints/latest                                name of the newest one, for people
    checkpoints/kept/step_00001000/                   kept for good; no run goes on from it

A folder without a whole manifest is not a checkpoint, whatever its name.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
LATEST = "latest"
KEPT = "kept"
STEP_PATTERN = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or opened. The message says which and why."""


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:  # hashlib.file_digest needs Python 3.11
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """Folders that were renamed into place, by step, oldest first. Not verified."""
    if not checkpoints.is_dir():
        return {}
    found = {}
    for path in checkpoints.iterdir():
        match = STEP_PATTERN.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises CheckpointError when it is missing or torn."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["step"], int):
            raise TypeError("files or step have the wrong type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({error})") from error
    return manifest


def verify(folder: Path) -> list[str]:
    """Everything wrong with a checkpoint; empty when every byte is as its manifest says."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    if folder.name != step_name(manifest["step"]):
        problems.append(f"{folder}: the manifest is of step {manifest['step']}")
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                problems.append(f"{path}: {size} bytes instead of {entry['bytes']}")
            elif sha256_file(path) != entry["sha256"]:
                problems.append(f"{path}: sha256 differs from the manifest")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


def latest_verified(checkpoints: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that verifies, or None when there is none at all.

    Raises:
        CheckpointError: checkpoints exist and none verifies. A run never starts again silently.
    """
    problems: list[str] = []
    for step, folder in reversed(committed_steps(checkpoints).items()):
        found = verify(folder)
        if not found:
            return step, folder
        problems += found
    if problems:
        raise CheckpointError(
            "no checkpoint can be opened; move them away to start again: " + "; ".join(problems)
        )
    if committed_steps(checkpoints / KEPT):
        raise CheckpointError(
            f"{checkpoints} holds only those in {KEPT}; move one of them up to go on from it, or "
            "all of them away to start again"
        )
    return None
