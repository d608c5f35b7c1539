"""A save may end at any call to the file system; in the background it is the same.

Every run here is of one small network in one process. `tests/cluster/test_zero.py` has the ranks.
"""

import os
import shutil
import stat
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from distill import checkpoint, saver
from distill.config import ConfigError, DiTConfig, ImageSpec, TrainConfig
from distill.engine import TorchEngine
from distill.manifest import (
    KEPT,
    CheckpointError,
    committed_steps,
    latest_verified,
    read_manifest,
    verify,
)
from distill.networks import build_network
from distill.objective_config import ReflowConfig
from distill.objectives import build_objective
from distill.rundir import RunDir, read_lines
from distill.testing import StraightFlow, flow_batch
from distill.train import train

IMAGE = ImageSpec(1, 4, 3)
NETWORK = DiTConfig(patch_size=2, width=8, depth=1, num_heads=1)
DOUBLE = flow_batch(StraightFlow(torch.full(IMAGE.shape, 0.5), 0.3), grid=2, count=4)
FLOATS = {name: getattr(DOUBLE, name).float() for name in ("states", "times", "weights")}
BATCH = replace(DOUBLE, **FLOATS)


def fit(root, steps, read=lambda step: BATCH, stop=lambda: False, **settings):
    """Trains to step `steps` and saves every two, if not said otherwise; its engine."""
    settings = {"save_every": 2, "log_every": 2, "decay": "constant", **settings}
    config = TrainConfig(batch_size=4, **settings)
    config.max_steps = steps
    engine = TorchEngine(build_network(NETWORK, IMAGE, seed=3), config, torch.device("cpu"))
    objective = build_objective(ReflowConfig(), 0)
    train(
        engine,
        read,
        objective,
        config,
        RunDir(root),
        origin={"seed": 0},
        wait_s=lambda: 0.0,
        should_stop=stop,
    )
    return engine


def folder_of(root, step):
    return RunDir(root).checkpoints / f"step_{step:08d}"


def state(engine):
    return {(f.kind, f.name): f.data.clone() for f in engine.fragments()}


# -----------------------------------------------------------------------------------------------
# Killed

CALLS = ("fsync", "rename", "replace", "rmdir", "unlink")
# The save under test is of step 8. It keeps only itself, and step 4 for good.
FIRST = {"keep_last": 3}
THEN = {"keep_last": 1, "keep_every": 4}


class Watch:
    """Copies a run as a kill would leave it, before every call to the file system of one save.

    Where a file is about to be flushed, also as a loss of power may leave it: cut in half.
    """

    def __init__(self, root, folder):
        self.root, self.folder = root, folder
        self.names, self.copies, self.thread = [], [], None

    def commit(self, real, checkpoints, snapshot, *rest):
        self.thread = threading.get_ident() if snapshot.step == 8 else None
        size = real(checkpoints, snapshot, *rest)
        self.thread = None
        return size

    def call(self, name, real, *args, **options):
        if threading.get_ident() == self.thread:
            is_file = name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode)
            self.copy()
            if is_file:
                path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
                torn = self.copy() / path.relative_to(self.root)
                os.truncate(torn, torn.stat().st_size // 2)
            self.names.append("fsync of a file" if is_file else name)
        return real(*args, **options)

    def copy(self):
        target = self.folder / f"{len(self.copies)}"
        self.copies.append((len(self.names), target))
        return shutil.copytree(self.root, target)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib holds its own functions of os")
@pytest.mark.parametrize("save_async", [False, True])
def test_a_save_may_end_at_any_call_and_the_run_goes_on(tmp_path, monkeypatch, save_async):
    whole = state(fit(tmp_path / "whole", 9))
    fit(tmp_path / "run", 6, **FIRST)
    assert list(committed_steps(RunDir(tmp_path / "run").checkpoints)) == [2, 4, 6]
    watch = Watch((tmp_path / "run").resolve(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "commit", partial(watch.commit, saver.commit))
        for name in CALLS:
            patch.setattr(os, name, partial(watch.call, name, getattr(os, name)))
        fit(tmp_path / "run", 9, save_async=save_async, **THEN)
    # Three files are flushed: the rank's, the manifest, the pointer. Two folders are deleted.
    assert watch.names.count("fsync of a file") == 3 and watch.names.count("rmdir") == 2
    committed = watch.names.index("rename") + 1  # after the rename it is there
    for at, copy in watch.copies:
        run, where = RunDir(copy), f"call {at} of {watch.names}"
        step = 8 if at >= committed else 6
        assert latest_verified(run.checkpoints)[0] == step, where
        resumed = state(fit(copy, 9, save_async=save_async, **THEN))
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), where
        starts = [e["step"] for e in read_lines(run.events) if e["kind"] == "resume"]
        assert starts == [0, 6, step], where
        names = {path.name for path in run.checkpoints.iterdir()}
        assert names == {"step_00000009", "latest", KEPT}, where
        assert not verify(run.checkpoints / KEPT / "step_00000004"), where


# -----------------------------------------------------------------------------------------------
# In the background


def test_training_goes_on_while_a_save_is_written_and_the_bytes_are_the_same(tmp_path, monkeypatch):
    """A step is taken before the state of step 2 is written, and the next save waits for it."""
    fit(tmp_path / "waits", 6, keep_last=9)
    order, real, taken = [], saver.commit, threading.Event()

    def read(step):
        order.append(f"read {step}")
        if step == 3:
            taken.set()
        return BATCH

    def commit(checkpoints, snapshot, *rest):
        assert taken.wait(60)
        size = real(checkpoints, snapshot, *rest)
        order.append(f"committed {snapshot.step}")
        return size

    monkeypatch.setattr(saver, "commit", commit)
    fit(tmp_path / "goes on", 6, read, keep_last=9, save_async=True)
    assert order.index("read 3") < order.index("committed 2")
    commits = [said for said in order if said.startswith("committed")]
    assert commits == ["committed 2", "committed 4", "committed 6"]
    for step in (2, 4, 6):
        found, expected = (folder_of(tmp_path / name, step) for name in ("goes on", "waits"))
        assert read_manifest(found) == read_manifest(expected)
        assert not verify(found)
    saves = [e for e in read_lines(RunDir(tmp_path / "goes on").events) if e["kind"] == "save"]
    assert [save["step"] for save in saves] == [2, 4, 6]
    assert all(0 < save["stall_s"] <= save["seconds"] for save in saves)
    files = read_manifest(folder_of(tmp_path / "goes on", 2))["files"].values()
    assert saves[0]["bytes"] == sum(file["bytes"] for file in files)


def test_a_stop_and_an_error_wait_for_the_save(tmp_path, monkeypatch):
    slow = threading.Event()
    real = saver.commit

    def commit(*args):
        slow.wait(0.3)
        return real(*args)

    monkeypatch.setattr(saver, "commit", commit)
    seen = []

    def read(step):
        seen.append(step)
        if step == 2 and "error" in seen:
            raise OSError("no more data")
        return BATCH

    fit(tmp_path / "stop", 8, read, stop=lambda: len(seen) == 3, save_async=True)
    assert latest_verified(RunDir(tmp_path / "stop").checkpoints)[0] == 3
    seen.append("error")
    with pytest.raises(OSError, match="no more data"):
        fit(tmp_path / "error", 8, read, save_async=True)
    assert latest_verified(RunDir(tmp_path / "error").checkpoints)[0] == 2


def test_a_save_that_fails_in_the_background_stops_training(tmp_path, monkeypatch):
    """At the first step after it is known, long before the next save, and without a trace of it."""
    fit(tmp_path, 2)
    savers, seen = [], []

    class Known(saver.Saver):
        def __init__(self, *args):
            super().__init__(*args)
            savers.append(self)

    def full(*args):
        raise OSError(28, "No space left on device")

    def read(step):
        seen.append(step)
        while step == 5 and not savers[0].has_failed:
            time.sleep(0.01)
        return BATCH

    monkeypatch.setattr("distill.train.Saver", Known)
    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        fit(tmp_path, 100, read, save_every=4, save_async=True)
    assert seen[0] == 2 and seen[-1] in (4, 5)
    assert {path.name for path in RunDir(tmp_path).checkpoints.iterdir()} == {
        "step_00000002",
        "latest",
    }


# -----------------------------------------------------------------------------------------------
# Kept for good


def test_multiples_of_keep_every_are_kept_and_no_run_goes_on_from_them(tmp_path):
    fit(tmp_path, 12, keep_last=2, keep_every=4)
    checkpoints = RunDir(tmp_path).checkpoints
    assert list(committed_steps(checkpoints)) == [10, 12]
    assert list(committed_steps(checkpoints / KEPT)) == [4, 8]
    assert not any(verify(folder) for folder in committed_steps(checkpoints / KEPT).values())
    for folder in committed_steps(checkpoints).values():
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="holds only those in kept"):
        fit(tmp_path, 14)
    (checkpoints / KEPT / "step_00000008").rename(checkpoints / "step_00000008")
    fit(tmp_path, 14, keep_last=1, keep_every=4)
    starts = [e["step"] for e in read_lines(RunDir(tmp_path).events) if e["kind"] == "resume"]
    assert starts == [0, 8]
    assert list(committed_steps(checkpoints / KEPT)) == [4, 8, 12]


def test_nothing_is_deleted_or_moved_before_the_newest_verifies(tmp_path, monkeypatch):
    fit(tmp_path, 4, keep_last=2)
    real = checkpoint.write_atomic

    def rotten(path, data):
        real(path, data[:-1] if path.name.startswith("rank") else data)

    monkeypatch.setattr(checkpoint, "write_atomic", rotten)
    fit(tmp_path, 8, keep_last=2, keep_every=2)
    checkpoints = RunDir(tmp_path).checkpoints
    assert list(committed_steps(checkpoints)) == [2, 4, 6, 8]
    assert latest_verified(checkpoints)[0] == 4
    assert not (checkpoints / KEPT).exists()


def test_a_checkpoint_that_no_save_makes_cannot_be_kept():
    with pytest.raises(ConfigError, match=r"keep_every=250 must be a multiple of .*save_every=100"):
        TrainConfig(keep_every=250)
