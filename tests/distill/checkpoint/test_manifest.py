"""A process reads a checkpoint once, as long as nobody touches it; `verify` always reads."""

import json
import os
from dataclasses import replace

import pytest
from small_manifest import write_manifest

from distill.checkpoint import manifest
from distill.checkpoint.manifest import (
    SEAL,
    File,
    Manifest,
    foreign,
    latest_verified,
    rank_file,
    read_manifest,
    step_name,
    verify,
    verify_once,
)
from distill.config import ConfigError
from distill.run import files
from distill.run.files import sha256_file
from distill.run.records import tree_of, tree_sha256

A, B = rank_file(0), rank_file(1)


@pytest.fixture(autouse=True)
def _no_second_look(monkeypatch):
    """These files are bad and stay so."""
    monkeypatch.setattr(files, "LOOKS", 0)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two files."""
    folder = tmp_path / step_name(4)
    folder.mkdir()
    for name in (A, B):
        (folder / name).write_bytes(name[9:10].encode() * 100)
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
    assert sorted(read) == [A, B]
    assert verify(folder) == [] and sorted(read) == [A, A, B, B]


def test_a_flipped_bit_is_seen_though_the_size_is_the_same(folder, read):
    assert verify_once(folder) == []
    flip(folder / B)
    assert verify_once(folder) == [f"{folder / B}: sha256 differs from the manifest"]


def test_what_was_bad_is_always_read_again(folder, read):
    good = (folder / B).read_bytes()
    flip(folder / B)
    assert verify_once(folder) and verify_once(folder)
    assert sorted(read) == [A, A, B, B]
    (folder / B).write_bytes(good)
    assert verify_once(folder) == []


@pytest.mark.parametrize("change", ["replaced", "deleted", "manifest"])
def test_other_changes_are_seen(folder, read, change):
    assert verify_once(folder) == []
    if change == "replaced":  # by another file of the same size
        (folder / "new").write_bytes(b"x" * 100)
        (folder / "new").rename(folder / A)
    elif change == "deleted":
        (folder / A).unlink()
    else:
        (folder / "MANIFEST.json").write_text('{"step": 4, "fi')
    assert verify_once(folder)
    assert latest_verified_fails(folder.parent)


def latest_verified_fails(checkpoints):
    with pytest.raises(manifest.CheckpointError, match="no checkpoint can be opened"):
        latest_verified(checkpoints)
    return True


def rewrite(folder, **changes):
    """Writes a manifest as another version would; a key whose value is None is left out."""
    path = folder / "MANIFEST.json"
    tree = json.loads(path.read_text()) | changes
    tree = {key: value for key, value in tree.items() if value is not None and key != SEAL}
    path.write_text(json.dumps(tree | {SEAL: tree_sha256(tree)}))


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
    rewrite(folder, parameters={}, files={A: {"bytes": "100", "sha256": ""}})
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


def test_a_manifest_from_before_the_seal_is_read(folder):
    path = folder / "MANIFEST.json"
    tree = json.loads(path.read_text())
    assert tree.pop(SEAL) == tree_sha256(tree)
    path.write_text(json.dumps(tree))
    assert verify(folder) == []


def test_any_changed_byte_of_a_manifest_is_seen_and_fallen_back_behind(folder):
    """Keys too: one that is not known any more is damage, not a newer version."""
    older = folder.parent / step_name(2)
    older.mkdir()
    write_manifest(older, 2)
    path = folder / "MANIFEST.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (1, 32):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            if verify(folder):
                assert latest_verified(folder.parent) == (2, older)
            else:  # JSON says the same: white space, the case of a hash that is not compared
                assert json.loads(path.read_bytes()) == json.loads(content)
    path.write_bytes(content)
    assert latest_verified(folder.parent) == (4, folder)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"[" * 200_000, b"\xff\xfe{}", bytes(300), b""]
)
def test_a_manifest_of_any_content_is_no_checkpoint(folder, content):
    (folder / "MANIFEST.json").write_bytes(content)
    (problem,) = verify(folder)
    assert "no readable MANIFEST.json" in problem


@pytest.mark.parametrize("names", [[], [A], [A, B, rank_file(2)], [A, "../../secret"]])
def test_a_manifest_names_a_file_for_each_rank_and_no_other(folder, names):
    entry = json.loads((folder / "MANIFEST.json").read_text())["files"][A]
    rewrite(folder, files=dict.fromkeys(names, entry))
    assert verify(folder) == [f"{folder}: the manifest does not name a file for each rank"]


def test_a_checkpoint_of_another_run_is_told(folder):
    made = read_manifest(folder)
    assert not foreign(made, {"seed": 7, "config_hash": "ab"})  # it does not say
    made = replace(made, seed=7, config_hash="ab")
    assert not foreign(made, {"seed": 7, "config_hash": "ab"}) and not foreign(made, {})
    assert "its seed is 7, not 8" in foreign(made, {"seed": 8, "config_hash": "ab"})
    assert "its config_hash is ab, not cd" in foreign(made, {"seed": 7, "config_hash": "cd"})


def test_deleted_checkpoints_are_forgotten(folder, read, tmp_path):
    assert verify_once(folder) == []
    assert folder in manifest._whole
    folder.rename(tmp_path / "gone")
    other = tmp_path / step_name(6)
    other.mkdir()
    write_manifest(other, 6)
    assert verify_once(other) == []
    assert folder not in manifest._whole and other in manifest._whole
