"""A manifest around the files that a test has written."""

from pathlib import Path

from distill.checkpoint import manifest
from distill.checkpoint.manifest import FORMAT, MANIFEST, File, Manifest
from distill.run.files import sha256_file


def manifest_of(step: int, files: dict[str, File] | None = None) -> Manifest:
    """That of plain processes, without parameters."""
    return Manifest(
        format=FORMAT,
        step=step,
        world_size=len(files or {}),
        engine="torch",
        zero_stage=0,
        precision="fp32",
        averages={},
        parameters={},
        rng="counter-based",
        versions={},
        files=files or {},
    )


def write_manifest(folder: Path, step: int) -> None:
    """Writes the manifest of the files in a folder."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    files = {path.name: File(path.stat().st_size, sha256_file(path)) for path in paths}
    manifest.write_manifest(folder, manifest_of(step, files))
