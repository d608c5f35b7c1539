"""What is saved is verified before it is opened. A save may end at any call to the file system.

Every run here is of a small network in one process; `tests/cluster/trainer/test_checkpoint.py` has
ranks.
"""

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from distill.checkpoint import commit as checkpoint
from distill.checkpoint.manifest import (
    KEPT,
    CheckpointError,
    SaveError,
    committed_steps,
    latest_verified,
    read_manifest,
    verify,
)
from distill.config import ConfigError, TrainConfig
from distill.engine.engine import TorchEngine
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.run.files import RunDir, read_lines
from distill.training import saving


@pytest.fixture
def fit(tiny):
    """Trains to a step and saves every two, if not said otherwise; the engine."""
    return partial(tiny.fit, save_every=2, log_every=2, decay="constant")


def folder_of(root, step):
    return RunDir(root).checkpoints / f"step_{step:08d}"


def state(engine):
    return {(f.kind, f.name): f.data.clone() for f in engine.fragments()}


# -----------------------------------------------------------------------------------------------
# Saved, verified, opened


@pytest.fixture
def saved(tmp_path, fit) -> Path:
    fit(tmp_path, 10, save_every=4)
    return RunDir(tmp_path).checkpoints


def test_the_newest_two_are_kept_and_verify(saved):
    assert list(committed_steps(saved)) == [8, 10]
    assert latest_verified(saved) == (10, saved / "step_00000010")
    assert (saved / "latest").read_text() == "step_00000010\n"
    assert not list(saved.glob("*.tmp-*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_never_opened_and_the_one_before_is(
    saved, tmp_path, damage, fit, tiny
):
    file = saved / "step_00000010" / "rank_00000.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "delete":
        file.unlink()
    else:
        (saved / "step_00000010" / "MANIFEST.json").write_text('{"step": 10, "fi')
    assert verify(saved / "step_00000010")
    assert latest_verified(saved) == (8, saved / "step_00000008")
    seen = []
    fit(tmp_path, 10, lambda step: seen.append(step) or tiny.batch, save_every=4)
    assert seen == [8, 9] and latest_verified(saved)[0] == 10
    (fallback,) = [e for e in read_lines(RunDir(tmp_path).events) if e["kind"] == "fallback"]
    assert (fallback["step"], fallback["damaged"]) == (8, [10])
    assert not verify(saved / "step_00000010")  # written anew
    assert len(list(saved.glob("step_00000010.bad-*"))) == 1  # the damaged one is kept aside


def test_a_run_never_starts_again_silently(saved, tmp_path, fit):
    for folder in committed_steps(saved).values():
        (folder / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be opened"):
        fit(tmp_path, 10, save_every=4)


def test_a_full_disk_leaves_no_trace_and_says_so(tmp_path, monkeypatch, fit):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.files, "write_atomic", full)
    with pytest.raises(SaveError, match="No space left on device"):
        fit(tmp_path, 10, save_every=4)
    assert list(RunDir(tmp_path).checkpoints.iterdir()) == []


def test_what_killed_saves_have_left_goes_before_room_is_needed(saved, tmp_path, fit, monkeypatch):
    """Otherwise some kills in the middle of a save fill a disk for ever."""
    left = [saved / f"step_{step:08d}.tmp-{nonce:016x}" for nonce, step in enumerate((12, 12, 14))]
    writes, write_atomic = [], checkpoint.files.write_atomic

    def record(path, data):
        writes.append([folder.exists() for folder in left])
        write_atomic(path, data)

    def leave():
        for folder in left:
            folder.mkdir()
            (folder / "rank_00000.safetensors").write_bytes(bytes(1000))

    leave()
    before = committed_steps(saved)
    checkpoint.load_latest(saved, fit(tmp_path / "other", 2))
    assert committed_steps(saved) == before and not any(folder.exists() for folder in left)
    leave()
    monkeypatch.setattr(checkpoint.files, "write_atomic", record)
    fit(tmp_path, 12)
    assert writes and not any(map(any, writes)) and 12 in committed_steps(saved)


# Saves of step 15, and a start before each; dies by SIGKILL at its n-th call to the file system,
# n drawn, 200 times. Then one that lives. Prints bytes on the disk, before and after.
KILLED_SAVES = """
import os, random, signal, sys
from pathlib import Path
import torch
from distill.checkpoint import commit, manifest

class One:
    rank, world_size = 0, 1
    def gather(self, tensor):
        return tensor[None]
    def any(self, value):
        return bool(value)

torch.set_num_threads(1)
folder, odd = Path(sys.argv[1]), random.Random(0)

def save(step):
    commit.clean_staging(folder)  # as every start does
    about = manifest.Manifest(
        format=1, step=step, world_size=1, engine="torch", zero_stage=0, precision="fp32",
        averages={}, parameters={}, rng="counter-based", versions={},
    )
    commit.commit(folder, commit.Snapshot(about, {"master|p|0": torch.randn(50_000)}), One(), 2)

def used():
    return sum(path.stat().st_blocks for path in folder.rglob("*")) * 512

def deadly(function):
    def call(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)
    return call

for step in (5, 10, 15):
    save(step)
before, most, killed, step = used(), 0, 0, 15
while killed < 200:
    step += 5
    left = odd.randrange(1, 14)
    if os.fork() == 0:
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        save(step)
        os._exit(0)
    killed += os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    most = max(most, used())
save(step + 5)
print(before, most, used(), *manifest.committed_steps(folder))
"""


@pytest.mark.slow
def test_two_hundred_kills_in_the_middle_of_a_save_leave_the_disk_as_it_was(tmp_path, measured):
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path / "checkpoints")]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    before, most, after, *steps = map(int, out)
    assert after == before and len(steps) == 2
    assert most < 2.1 * before  # two checkpoints, one more, and what one killed save has left
    measured(f"bytes before {before:,}, at most {most:,}, after 200 kills {after:,}")


def test_a_checkpoint_of_another_run_is_refused(saved, tmp_path, fit):
    engine = fit(tmp_path / "other", 2)
    assert checkpoint.load_latest(saved, engine, {"seed": 0}) == 10
    with pytest.raises(CheckpointError, match="of another run: its seed is 0, not 1; move it away"):
        checkpoint.load_latest(saved, engine, {"seed": 1})


def test_another_network_is_refused(saved, tmp_path, tiny):
    other = DiTConfig(patch_size=2, width=32, depth=2, num_heads=2)
    engine = TorchEngine(build_network(other, tiny.image), TrainConfig(), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="not those of this network"):
        checkpoint.load_latest(saved, engine)


def test_an_average_is_read_back_as_whole_tensors(saved, tmp_path, fit):
    engine = fit(tmp_path, 10, save_every=4)
    average = checkpoint.read_average(saved / "step_00000010", "evaluation")
    for (kind, name), value in state(engine).items():
        if kind == "ema/evaluation":
            assert torch.equal(average[name].flatten(), value)


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
def test_a_save_may_end_at_any_call_and_the_run_goes_on(tmp_path, monkeypatch, save_async, fit):
    whole = state(fit(tmp_path / "whole", 9))
    fit(tmp_path / "run", 6, **FIRST)
    assert list(committed_steps(RunDir(tmp_path / "run").checkpoints)) == [2, 4, 6]
    watch = Watch((tmp_path / "run").resolve(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "commit", partial(watch.commit, checkpoint.commit))
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


def test_training_goes_on_while_a_save_is_written_and_the_bytes_are_the_same(
    tmp_path, monkeypatch, fit, tiny
):
    """A step is taken before the state of step 2 is written, and the next save waits for it."""
    fit(tmp_path / "waits", 6, keep_last=9)
    order, real, taken = [], checkpoint.commit, threading.Event()

    def read(step):
        order.append(f"read {step}")
        if step == 3:
            taken.set()
        return tiny.batch

    def commit(checkpoints, snapshot, *rest):
        assert taken.wait(60)
        size = real(checkpoints, snapshot, *rest)
        order.append(f"committed {snapshot.step}")
        return size

    monkeypatch.setattr(checkpoint, "commit", commit)
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
    files = read_manifest(folder_of(tmp_path / "goes on", 2)).files.values()
    assert saves[0]["bytes"] == sum(file.bytes for file in files)


def test_a_stop_and_an_error_wait_for_the_save(tmp_path, monkeypatch, fit, tiny):
    slow = threading.Event()
    real = checkpoint.commit

    def commit(*args):
        slow.wait(0.3)
        return real(*args)

    monkeypatch.setattr(checkpoint, "commit", commit)
    seen = []

    def read(step):
        seen.append(step)
        if step == 2 and "error" in seen:
            raise OSError("no more data")
        return tiny.batch

    fit(tmp_path / "stop", 8, read, stop=lambda: len(seen) == 3, save_async=True)
    assert latest_verified(RunDir(tmp_path / "stop").checkpoints)[0] == 3
    seen.append("error")
    with pytest.raises(OSError, match="no more data"):
        fit(tmp_path / "error", 8, read, save_async=True)
    assert latest_verified(RunDir(tmp_path / "error").checkpoints)[0] == 2


def test_a_save_that_fails_in_the_background_stops_training(tmp_path, monkeypatch, fit, tiny):
    """At the first step after it is known, long before the next save, and without a trace of it."""
    fit(tmp_path, 2)
    savers, seen = [], []

    class Known(saving.Checkpointer):
        def __init__(self, *args):
            super().__init__(*args)
            savers.append(self)

    def full(*args):
        raise OSError(28, "No space left on device")

    def read(step):
        seen.append(step)
        while step == 5 and not savers[0].has_failed:
            time.sleep(0.01)
        return tiny.batch

    monkeypatch.setattr("distill.training.saving.Checkpointer", Known)
    monkeypatch.setattr(checkpoint.files, "write_atomic", full)
    with pytest.raises(SaveError, match="No space left on device"):
        fit(tmp_path, 100, read, save_every=4, save_async=True)
    assert seen[0] == 2 and seen[-1] in (4, 5)
    assert {path.name for path in RunDir(tmp_path).checkpoints.iterdir()} == {
        "step_00000002",
        "latest",
    }


# -----------------------------------------------------------------------------------------------
# Kept for good


def test_multiples_of_keep_every_are_kept_and_no_run_goes_on_from_them(tmp_path, fit):
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


def test_nothing_is_deleted_or_moved_before_the_newest_verifies(tmp_path, monkeypatch, fit):
    fit(tmp_path, 4, keep_last=2)
    real = checkpoint.files.write_atomic

    def rotten(path, data):
        real(path, data[:-1] if path.name.startswith("rank") else data)

    monkeypatch.setattr(checkpoint.files, "write_atomic", rotten)
    fit(tmp_path, 8, keep_last=2, keep_every=2)
    checkpoints = RunDir(tmp_path).checkpoints
    assert list(committed_steps(checkpoints)) == [2, 4, 6, 8]
    assert latest_verified(checkpoints)[0] == 4
    assert not (checkpoints / KEPT).exists()


def test_a_checkpoint_that_no_save_makes_cannot_be_kept():
    with pytest.raises(ConfigError, match=r"keep_every=250 must be a multiple of .*save_every=100"):
        TrainConfig(keep_every=250)
