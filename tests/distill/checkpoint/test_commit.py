"""A save on several ranks: who reads what, and how it fails.

Ranks are threads here; `tests/distill/checkpoint/test_killed_saves.py` has processes.
"""

import errno
import logging
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from small_manifest import manifest_of
from small_training import single_engine
from thread_ranks import errors, results

from distill.checkpoint import commit as checkpoint
from distill.checkpoint.agree import agreed_latest
from distill.checkpoint.commit import Snapshot, commit
from distill.checkpoint.manifest import (
    KEPT,
    LATEST,
    SaveError,
    committed_steps,
    latest_verified,
    read_manifest,
    verify,
)
from distill.config import TrainConfig
from distill.training.saving import Checkpointer


def snapshot(step, rank):
    return Snapshot(manifest_of(step), {f"master|w{rank}|0": torch.ones(4)})


def save(checkpoints, step, world_size=4, keep_last=2, keep_every=0):
    """What each rank raised."""

    def work(ranks):
        commit(checkpoints, snapshot(step, ranks.rank), ranks, keep_last, keep_every)

    return errors(world_size, work)


def named(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir())


@pytest.fixture
def shares(monkeypatch):
    """(part, parts) of every time that files of a checkpoint were read."""
    found = []

    def record(folder, part=0, parts=1):
        found.append((part, parts))
        return verify(folder, part, parts)

    monkeypatch.setattr("distill.checkpoint.manifest.verify", record)
    return found


def test_a_save_reads_every_file_once_and_no_rank_reads_all(tmp_path, shares):
    assert save(tmp_path, 2) == [None] * 4
    assert sorted(shares) == [(part, 4) for part in range(4)]
    assert len(read_manifest(tmp_path / "step_00000002").files) == 4
    assert not verify(tmp_path / "step_00000002")


def test_a_step_that_is_there_and_whole_stays_and_is_read_once(tmp_path, shares):
    save(tmp_path, 2)
    before = (tmp_path / "step_00000002" / "MANIFEST.json").stat().st_ino
    shares.clear()
    assert save(tmp_path, 2) == [None] * 4
    assert sorted(shares) == [(part, 4) for part in range(4)]
    assert (tmp_path / "step_00000002" / "MANIFEST.json").stat().st_ino == before
    assert named(tmp_path) == [LATEST, "step_00000002"]


# -----------------------------------------------------------------------------------------------
# A rank cannot write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_all_ranks_say_why_one_could_not_write_and_the_next_save_succeeds(
    tmp_path, monkeypatch, code
):
    save(tmp_path, 2)
    real = checkpoint.files.write_atomic

    def fail(path, data):
        if path.name == "rank_00001.safetensors":
            raise OSError(code, errno.errorcode[code])
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.files, "write_atomic", fail)
        found = save(tmp_path, 4)
    assert [type(error) for error in found] == [SaveError] * 4
    (said,) = {str(error) for error in found}
    assert said.startswith("rank 1 could not write") and errno.errorcode[code] in said
    assert named(tmp_path) == [LATEST, "step_00000002"]
    assert results(4, lambda ranks: agreed_latest(tmp_path, ranks)) == [2] * 4
    assert save(tmp_path, 4) == [None] * 4 and latest_verified(tmp_path)[0] == 4


def test_a_manifest_that_cannot_be_written_is_said_by_all(tmp_path, monkeypatch):
    def fail(path, value):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.files, "write_json", fail)
    (said,) = {str(error) for error in save(tmp_path, 2)}
    assert said.startswith("rank 0 could not commit") and "Input/output error" in said
    assert named(tmp_path) == []


@pytest.mark.parametrize("save_async", [False, True])
def test_an_event_that_rank_0_cannot_write_is_raised_on_every_rank(
    tmp_path, monkeypatch, save_async
):
    """The other ranks would go on, and wait for rank 0 for ever."""

    def committed(record):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(ranks):
        config = TrainConfig(save_async=save_async)
        engine = single_engine(config)
        engine.rank, engine.background = ranks.rank, ranks
        engine.any, engine.gather = ranks.any, ranks.gather
        event = committed if ranks.rank == 0 else lambda save: None
        with closing(Checkpointer(tmp_path, engine, config, {}, event)) as one:
            one.save(2)
            one.wait()

    monkeypatch.setattr(
        checkpoint, "take_snapshot", lambda step, engine, _: snapshot(step, engine.rank)
    )
    found = errors(3, work)
    assert [type(error) for error in found] == [SaveError] * 3
    assert all("step 2 is saved, and no event could say so" in str(error) for error in found)
    assert latest_verified(tmp_path)[0] == 2


# -----------------------------------------------------------------------------------------------
# What comes after the rename


def refuse(*args, **options):
    raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.mark.parametrize("call", ["delete", "keep", "pointer", "list"])
def test_what_fails_after_the_rename_is_a_warning_and_done_by_the_next_save(
    tmp_path, monkeypatch, caplog, call
):
    for step in (2, 4):
        save(tmp_path, step, keep_last=9)
    keep = {"keep_last": 1, "keep_every": 4 if call == "keep" else 0}
    real = checkpoint.files.write_atomic
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        if call == "delete":
            patch.setattr(checkpoint, "_delete", refuse)
        elif call == "keep":
            patch.setattr(Path, "rename", fail_into(KEPT))
        elif call == "pointer":
            patch.setattr(checkpoint.files, "write_atomic", fail_at(LATEST, real))
        else:
            patch.setattr(checkpoint.manifest, "committed_steps", refuse)
        assert save(tmp_path, 6, **keep) == [None] * 4
    assert "Device or resource busy" in caplog.text and "tries again" in caplog.text
    assert latest_verified(tmp_path)[0] == 6
    assert save(tmp_path, 8, **keep) == [None] * 4
    assert list(committed_steps(tmp_path)) == [8]
    assert list(committed_steps(tmp_path / KEPT)) == ([4] if call == "keep" else [])
    assert (tmp_path / LATEST).read_text() == "step_00000008\n"


def fail_into(folder):
    """`Path.rename` that refuses to move anything there."""
    real = Path.rename
    return lambda path, to: refuse() if Path(to).parent.name == folder else real(path, to)


def fail_at(name, real):
    """A write that refuses files of that name."""
    return lambda path, data: refuse() if path.name == name else real(path, data)


def test_one_folder_that_cannot_go_does_not_hold_the_others(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        save(tmp_path, step, keep_last=9)
    real = checkpoint._delete
    stuck = "step_00000004"
    monkeypatch.setattr(
        checkpoint, "_delete", lambda f, parent: refuse() if f.name == stuck else real(f, parent)
    )
    assert save(tmp_path, 8, keep_last=1) == [None] * 4
    assert list(committed_steps(tmp_path)) == [4, 8]


def test_older_ones_stay_and_a_warning_says_so_when_the_new_one_is_bad(
    tmp_path, monkeypatch, caplog
):
    save(tmp_path, 2, keep_last=1)
    real = checkpoint.files.write_atomic

    def rotten(path, data):
        real(path, data[:-1] if path.name == "rank_00002.safetensors" else data)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(checkpoint.files, "write_atomic", rotten)
        assert save(tmp_path, 4, keep_last=1) == [None] * 4
    assert "the new one is bad" in caplog.text and "rank_00002" in caplog.text
    assert results(2, lambda ranks: agreed_latest(tmp_path, ranks)) == [2, 2]
    shutil.rmtree(tmp_path / "step_00000002")
    assert save(tmp_path, 4, keep_last=1) == [None] * 4  # written anew, the bad one kept aside
    assert latest_verified(tmp_path)[0] == 4 and len(list(tmp_path.glob("*.bad-*"))) == 1


def test_a_newer_one_that_is_bad_does_not_count(tmp_path):
    """The run fell back behind step 6, and was asked to stop before it came there again."""
    for step in (2, 4, 6):
        save(tmp_path, step, keep_last=9)
    (tmp_path / "step_00000006" / "rank_00003.safetensors").unlink()
    assert save(tmp_path, 5, keep_last=1) == [None] * 4
    assert list(committed_steps(tmp_path)) == [5, 6]
    assert results(2, lambda ranks: agreed_latest(tmp_path, ranks)) == [5, 5]
