"""What several tests of the cluster write by hand."""

import pytest

from distill.manifest import sha256_file, step_name
from distill.rundir import write_json


@pytest.fixture(scope="session")
def write_checkpoint():
    """(run, step) -> the folder of a committed checkpoint with one file, `data`, without state."""

    def write(run, step):
        folder = run.checkpoints / step_name(step)
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"weights")
        entry = {"bytes": 7, "sha256": sha256_file(folder / "data")}
        write_json(folder / "MANIFEST.json", {"step": step, "files": {"data": entry}})
        return folder

    return write
