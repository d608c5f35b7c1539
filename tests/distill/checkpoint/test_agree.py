"""What ranks find out together: the same answer on each, and every file is read once."""

import threading

import pytest
from small_manifest import write_manifest
from thread_ranks import errors, results

from distill.checkpoint import agree
from distill.checkpoint.agree import agreed_latest, gather_texts, raise_together, verify_together
from distill.checkpoint.manifest import (
    KEPT,
    CheckpointError,
    SaveError,
    latest_verified,
    step_name,
    verify,
)


def write_checkpoint(checkpoints, step, files=4):
    folder = checkpoints / step_name(step)
    folder.mkdir(parents=True)
    for rank in range(files):
        path = folder / f"rank_{rank:05d}.safetensors"
        path.write_bytes(f"step {step} of rank {rank}".encode())
    write_manifest(folder, step)
    return folder


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# -----------------------------------------------------------------------------------------------
# Reasons


def test_every_rank_raises_the_reason_of_the_one_that_failed():
    def fail(ranks):
        reason = "rank 1 could not write: [Errno 28]" if ranks.rank == 1 else ""
        raise_together(ranks, reason, SaveError)

    found = errors(3, fail)
    assert [type(error) for error in found] == [SaveError] * 3
    assert {str(error) for error in found} == {"rank 1 could not write: [Errno 28]"}
    assert errors(3, lambda ranks: raise_together(ranks, "", SaveError)) == [None] * 3


def test_of_many_reasons_some_are_named_and_the_same_one_only_once():
    reason = "rank {} is unwell".format
    found = errors(6, lambda ranks: raise_together(ranks, reason(ranks.rank // 2), SaveError))
    assert str(found[5]) == "rank 0 is unwell; rank 1 is unwell; rank 2 is unwell"
    found = errors(6, lambda ranks: raise_together(ranks, reason(ranks.rank), SaveError))
    assert str(found[5]) == "rank 0 is unwell; rank 1 is unwell; rank 2 is unwell; and 3 more"


def test_a_long_text_is_cut_and_letters_of_several_bytes_are_not_torn():
    texts = ["ä" * 2000, "", "x" + "ä" * 2000]
    found = results(3, lambda ranks: gather_texts(ranks, texts[ranks.rank]))
    assert found == [["ä" * 512, "", "x" + "ä" * 511]] * 3


# -----------------------------------------------------------------------------------------------
# Shares


def test_every_file_is_read_once_and_by_a_rank_of_another_node(tmp_path, monkeypatch):
    """Eight ranks on two nodes of four, or on four of two, as after a save."""
    folder, read = write_checkpoint(tmp_path, 4, files=8), {}
    here = threading.local()

    def record(folder, part, parts):
        read[here.rank] = sorted(path.name for path in folder.glob("rank_*"))[part::parts]
        return verify(folder, part, parts)

    def work(ranks):
        here.rank = ranks.rank
        return verify_together(folder, ranks)

    monkeypatch.setattr(agree.manifest, "verify", record)
    assert results(8, work) == [[]] * 8
    reader_of = {int(file[5:10]): rank for rank, files in read.items() for file in files}
    assert sorted(reader_of) == list(range(8)) and sum(map(len, read.values())) == 8
    for ranks_per_node in (2, 4):
        assert all(w // ranks_per_node != r // ranks_per_node for w, r in reader_of.items())


def test_parts_make_up_the_whole(tmp_path):
    folder = write_checkpoint(tmp_path, 4, files=5)
    for file in folder.glob("rank_*"):
        flip(file)
    for parts in (1, 2, 3, 7):
        found = [problem for part in range(parts) for problem in verify(folder, part, parts)]
        assert sorted(found) == sorted(verify(folder)) and len(found) == 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_one_bad_file_of_four_makes_every_rank_fall_back(tmp_path, world_size):
    """Ranks may be fewer or more than those that wrote the checkpoint."""
    write_checkpoint(tmp_path, 4)
    newest = write_checkpoint(tmp_path, 6)
    assert results(world_size, lambda ranks: agreed_latest(tmp_path, ranks)) == [6] * world_size
    bad = newest / "rank_00002.safetensors"
    flip(bad)
    said = [f"{bad}: sha256 differs from the manifest"]
    assert results(world_size, lambda ranks: verify_together(newest, ranks)) == [said] * world_size
    assert results(world_size, lambda ranks: agreed_latest(tmp_path, ranks)) == [4] * world_size
    bad.unlink()
    assert results(world_size, lambda ranks: agreed_latest(tmp_path, ranks)) == [4] * world_size


def test_ranks_that_see_different_manifests_believe_neither(tmp_path):
    folders = [write_checkpoint(tmp_path / "old", 4, 1), write_checkpoint(tmp_path / "new", 4, 2)]
    found = results(2, lambda ranks: verify_together(folders[ranks.rank], ranks))
    assert [len(problems) for problems in found] == [1, 1]
    assert all("ranks see different manifests" in problems[0] for problems in found)


# -----------------------------------------------------------------------------------------------
# Nothing verifies


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_errors_are_those_of_one_process_and_on_every_rank(tmp_path, world_size):
    def ask(ranks):
        return agreed_latest(tmp_path / "run", ranks)

    assert results(world_size, ask) == [0] * world_size  # there is none at all
    for step in (2, 4):
        folder = write_checkpoint(tmp_path / "run", step)
        flip(folder / "rank_00001.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint can be opened") as alone:
        latest_verified(tmp_path / "run")
    for error in errors(world_size, ask):
        assert type(error) is CheckpointError and str(error) == str(alone.value)
    (tmp_path / "run" / KEPT).mkdir()
    for step in (2, 4):
        folder = tmp_path / "run" / step_name(step)
        folder.rename(tmp_path / "run" / KEPT / folder.name)
    for error in errors(world_size, ask):
        assert type(error) is CheckpointError and "holds only those in kept" in str(error)
