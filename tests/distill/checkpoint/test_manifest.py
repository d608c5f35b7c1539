"""A process reads a checkpoint once, as long as nobody touches it; `verify` always reads."""

import json
import os

import pytest

from distill.checkpoint import manifest
from distill.checkpoint.manifest import latest_verified, step_name, verify, verify_once
from distill.run.files import sha256_file


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two files."""
    folder = tmp_path / step_name(4)
    folder.mkdir()
    entries = {}
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 100)
        os.utime(folder / name, (1e9, 1e9))  # long ago: a file system's clock may tick slowly
        entries[name] = {"bytes": 100, "sha256": sha256_file(folder / name)}
    (folder / "MANIFEST.json").write_text(json.dumps({"step": 4, "files": entries}))
    return folder


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read, so far."""
    names = []

    def record(path):
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(manifest, "sha256_file", record)
    return names


def flip(file):
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)


def test_what_was_whole_and_is_untouched_is_not_read_again(folder, read):
    assert [verify_once(folder) for _ in range(3)] == [[]] * 3
    assert latest_verified(folder.parent) == (4, folder)
    assert sorted(read) == ["a", "b"]
    assert verify(folder) == [] and sorted(read) == ["a", "a", "b", "b"]


def test_a_flipped_bit_is_seen_though_the_size_is_the_same(folder, read):
    assert verify_once(folder) == []
    flip(folder / "b")
    assert verify_once(folder) == [f"{folder / 'b'}: sha256 differs from the manifest"]


def test_what_was_bad_is_always_read_again(folder, read):
    good = (folder / "b").read_bytes()
    flip(folder / "b")
    assert verify_once(folder) and verify_once(folder)
    assert sorted(read) == ["a", "a", "b", "b"]
    (folder / "b").write_bytes(good)
    assert verify_once(folder) == []


@pytest.mark.parametrize("change", ["replaced", "deleted", "manifest"])
def test_other_changes_are_seen(folder, read, change):
    assert verify_once(folder) == []
    if change == "replaced":  # by another file of the same size
        (folder / "new").write_bytes(b"x" * 100)
        (folder / "new").rename(folder / "a")
    elif change == "deleted":
        (folder / "a").unlink()
    else:
        (folder / "MANIFEST.json").write_text('{"step": 4, "fi')
    assert verify_once(folder)
    assert latest_verified_fails(folder.parent)


def latest_verified_fails(checkpoints):
    with pytest.raises(manifest.CheckpointError, match="no checkpoint can be opened"):
        latest_verified(checkpoints)
    return True


def test_deleted_checkpoints_are_forgotten(folder, read, tmp_path):
    assert verify_once(folder) == []
    assert folder in manifest._whole
    folder.rename(tmp_path / "gone")
    other = tmp_path / step_name(6)
    other.mkdir()
    (other / "MANIFEST.json").write_text('{"step": 6, "files": {}}')
    assert verify_once(other) == []
    assert folder not in manifest._whole and other in manifest._whole
