"""A manifest around the files that a test has written."""

from pathlib import Path

from distill.checkpoint.manifest import FORMAT, MANIFEST, File, Manifest
from distill.run.files import sha256_file, write_json
from distill.run.records import tree_of


def manifest_of(step: int, files: dict[str, File] | None = None) -> Manifest:
    """That of one plain process, without parameters."""
    return Manifest(
        format=FORMAT,
        step=step,
        world_size=1,
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
    write_json(folder / MANIFEST, tree_of(manifest_of(step, files)))
