"""A process reads a checkpoint once, as long as nobody touches it; `verify` always reads."""

import json
import os

import pytest
from small_manifest import write_manifest

from distill.checkpoint import manifest
from distill.checkpoint.manifest import (
    File,
    Manifest,
    latest_verified,
    read_manifest,
    step_name,
    verify,
    verify_once,
)
from distill.config import ConfigError
from distill.run.files import sha256_file
from distill.run.records import tree_of


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two files."""
    folder = tmp_path / step_name(4)
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 100)
        os.utime(folder / name, (1e9, 1e9))  # long ago: a file system's clock may tick slowly
    write_manifest(folder, 4)
    return folder


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read, so far."""
    names = []

    def record(path):
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(manifest.files, "sha256_file", record)
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


def rewrite(folder, **changes):
    path = folder / "MANIFEST.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def test_a_manifest_of_a_newer_version_is_refused_and_not_fallen_back_behind(folder):
    """The steps after an older checkpoint would be trained again, by another version."""
    older = folder.parent / step_name(2)
    older.mkdir()
    write_manifest(older, 2)
    for changes, sentence in (
        ({"colour": "red"}, "MANIFEST.json has the field 'colour', which is not known; a newer"),
        ({"format": 2, "rng": None}, "MANIFEST.json has format 2, not 1; a newer version"),
    ):
        rewrite(folder, colour=None)
        rewrite(folder, **changes)
        with pytest.raises(ConfigError, match=sentence):
            latest_verified(folder.parent)
    rewrite(folder, format=1, rng="counter-based")
    assert latest_verified(folder.parent) == (4, folder)


def test_a_manifest_that_lacks_something_is_no_checkpoint(folder):
    rewrite(folder, parameters=None)
    assert verify(folder) == [f"{folder}: no readable MANIFEST.json (lacks the field 'parameters')"]
    rewrite(folder, parameters={}, files={"a": {"bytes": "100", "sha256": ""}})
    (problem,) = verify(folder)
    assert "says bytes=\"100\", which is no whole number in 'files'" in problem


def test_a_manifest_is_written_as_ever(folder):
    """Keys and their order are those of docs/formats.md."""
    made = Manifest(
        format=1,
        step=4,
        world_size=2,
        engine="deepspeed",
        zero_stage=2,
        precision="bf16",
        averages={"target": 0.5},
        parameters={"w": (2, 3)},
        rng="counter-based",
        seed=7,
        config_hash="ab",
        versions={"torch": "2"},
        files={"a": File(100, "cd")},
    )
    text = (
        '{"format": 1, "step": 4, "world_size": 2, "engine": "deepspeed", "zero_stage": 2, '
        '"precision": "bf16", "averages": {"target": 0.5}, "parameters": {"w": [2, 3]}, '
        '"rng": "counter-based", "seed": 7, "config_hash": "ab", "versions": {"torch": "2"}, '
        '"files": {"a": {"bytes": 100, "sha256": "cd"}}}'
    )
    assert json.dumps(tree_of(made)) == text
    (folder / "MANIFEST.json").write_text(text)
    assert read_manifest(folder) == made


def test_deleted_checkpoints_are_forgotten(folder, read, tmp_path):
    assert verify_once(folder) == []
    assert folder in manifest._whole
    folder.rename(tmp_path / "gone")
    other = tmp_path / step_name(6)
    other.mkdir()
    write_manifest(other, 6)
    assert verify_once(other) == []
    assert folder not in manifest._whole and other in manifest._whole
