"""kill -9 at each stage of a save: the run goes on from the last good step, as if undisturbed.

Processes of their own are killed while they save, and other ones go on. Copies of a run before
every call to the file system are in `test_checkpoint.py`.
"""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_training import assert_same_state, config_of, fit, read_state, single_engine, zero_engine
from thread_ranks import ThreadRank, results

from distill.checkpoint import commit as checkpoint
from distill.checkpoint.agree import agreed_latest
from distill.checkpoint.manifest import (
    KEPT,
    LATEST,
    SaveError,
    committed_steps,
    latest_verified,
    verify,
)
from distill.engine.engine import TorchEngine
from distill.run.files import RunDir, read_lines
from distill.testing import run_ranks

STEPS, EVERY = 8, 2
# A save keeps only itself, and multiples of four for good.
SETTINGS = {"max_steps": STEPS, "save_every": EVERY, "log_every": 1, "keep_last": 1}
SETTINGS |= {"keep_every": 4}


# -----------------------------------------------------------------------------------------------
# Where a save is killed


class Stage(NamedTuple):
    """A process dies in front of a call, when it is one of the save of `step`.

    Attributes:
        step: of the save.
        good: the last step that is whole then.
        module, function: what is called.
        matches: which of its calls, from the arguments.
        half: what of the call is done before, from the arguments.
    """

    step: int
    good: int
    module: Any
    function: str
    matches: Callable[..., bool]
    half: Callable[..., object] = lambda *args: None


def staged(name: str) -> Callable[..., bool]:
    """Calls for a file of that name in the folder where step 4 is staged."""
    return lambda path, *_: (
        path.parent.name.startswith("step_00000004.tmp-") and path.name.startswith(name)
    )


def write_half(path: Path, data: bytes) -> None:
    """What a write leaves that is killed in the middle."""
    path.with_name(f".{path.name}.tmp-half").write_bytes(data[: len(data) // 2])


def delete_half(folder: Path, *_: object) -> None:
    """What a deletion leaves that is killed in the middle: here no manifest."""
    (folder / "MANIFEST.json").unlink()


STAGES = {
    "before": Stage(4, 2, checkpoint, "commit", lambda _, snapshot, *rest: snapshot.step == 4),
    "before a file is written": Stage(4, 2, checkpoint.files, "write_atomic", staged("rank_")),
    "in the middle of a file": Stage(
        4, 2, checkpoint.files, "write_atomic", staged("rank_"), write_half
    ),
    "before the manifest": Stage(4, 2, checkpoint.files, "write_json", staged("MANIFEST")),
    "before the rename": Stage(
        4, 2, checkpoint, "_publish", lambda _, final: final.name == "step_00000004"
    ),
    "before the pointer": Stage(
        4,
        4,
        checkpoint.files,
        "write_atomic",
        lambda path, data: path.name == LATEST and data == b"step_00000004\n",
    ),
    "before it is verified": Stage(
        4, 4, checkpoint.agree, "verify_together", lambda folder, _: folder.name == "step_00000004"
    ),
    "before retention": Stage(
        4, 4, checkpoint, "_retain", lambda folder, *_: (folder / "step_00000004").exists()
    ),
    "in the middle of a deletion": Stage(
        4, 4, shutil, "rmtree", lambda path, **_: ".tmp-deleted-" in path.name, delete_half
    ),
    "before one is kept for good": Stage(
        6, 6, checkpoint, "_keep", lambda folder, _: folder.name == "step_00000004"
    ),
}


def arm(stage: Stage) -> None:
    """Has this process killed there."""
    real = getattr(stage.module, stage.function)

    def call(*args: object, **options: object) -> object:
        if stage.matches(*args, **options):
            stage.half(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(stage.module, stage.function, call)


# -----------------------------------------------------------------------------------------------
# One rank


def one_rank(rank: int, world_size: int, root: str, doom: str) -> int:
    """Trains on a plain engine; dies at that stage."""
    if doom:
        arm(STAGES[doom])
    config = config_of(**SETTINGS)
    return fit(single_engine(config), root, config)


def losses(root: Path) -> dict[int, tuple[float, float]]:
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in read_lines(RunDir(root).metrics)}


def resumes(root: Path) -> list[int]:
    return [e["step"] for e in read_lines(RunDir(root).events) if e["kind"] == "resume"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The same run without a kill."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks(one_rank, 1, folder / "ranks", str(folder / "run"), "") == [STEPS]
    return folder / "run"


@pytest.mark.parametrize("name", STAGES)
def test_a_kill_at_any_stage_of_a_save_costs_an_interval_at_most(tmp_path, undisturbed, name):
    stage, root = STAGES[name], tmp_path / "run"
    with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
        run_ranks(one_rank, 1, tmp_path / "dies", str(root), name)
    checkpoints = RunDir(root).checkpoints
    assert latest_verified(checkpoints)[0] == stage.good
    assert max(losses(root)) - stage.good <= EVERY  # steps that are done again
    assert run_ranks(one_rank, 1, tmp_path / "goes on", str(root), "") == [STEPS]
    assert resumes(root) == [0, stage.good]
    assert losses(root) == losses(undisturbed) and max(losses(root)) == STEPS
    expected = read_state(undisturbed, STEPS)
    assert all(torch.equal(v, expected[key]) for key, v in read_state(root, STEPS).items())
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000008", LATEST, KEPT}
    assert list(committed_steps(checkpoints / KEPT)) == [4]
    assert not verify(checkpoints / KEPT / "step_00000004")


# -----------------------------------------------------------------------------------------------
# Two ranks


def zero_rank(rank: int, world_size: int, root: str, doom: str, dies: int) -> int:
    """Trains on ZeRO; rank `dies` dies at that stage."""
    if doom and rank == dies:
        arm(STAGES[doom])
    config = config_of(**SETTINGS, zero_stage=1)
    return fit(zero_engine(config), root, config)


def assert_same(root: Path, expected: Path) -> None:
    """State and losses of two ranks and of one, within rounding."""
    assert_same_state(root, expected, STEPS)
    assert losses(root).keys() == losses(expected).keys()
    for step, found in losses(root).items():
        assert found == pytest.approx(losses(expected)[step], rel=1e-4), step


@pytest.mark.parametrize(
    ("name", "dies"),
    [("in the middle of a file", 1), pytest.param("before the pointer", 0, marks=pytest.mark.slow)],
)
def test_one_of_two_ranks_is_killed_and_both_go_on(tmp_path, undisturbed, name, dies):
    root = tmp_path / "run"
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(zero_rank, 2, tmp_path / "dies", str(root), name, dies)
    good = STAGES[name].good
    assert latest_verified(RunDir(root).checkpoints)[0] == good
    assert run_ranks(zero_rank, 2, tmp_path / "goes on", str(root), "", dies) == [STEPS] * 2
    assert resumes(root) == [0, good]
    assert_same(root, undisturbed)


# -----------------------------------------------------------------------------------------------
# Two ranks, one of which has no room


def cramped_rank(rank: int, world_size: int, root: str, save_async: bool) -> list:
    """Trains until the save of step 4, in the middle of which rank 1 may write no further.

    Returns what this rank raised, and the step that all then agree on.
    """
    real = checkpoint.files.write_atomic

    def write(path: Path, data: bytes) -> None:
        if rank == 1 and path.parent.name.startswith("step_00000004"):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, hard))
        real(path, data)

    checkpoint.files.write_atomic = write
    config = config_of(**{**SETTINGS, "keep_last": 2}, zero_stage=1, save_async=save_async)
    engine = zero_engine(config)
    try:
        fit(engine, root, config)
    except SaveError as error:
        return [str(error), agreed_latest(RunDir(Path(root)).checkpoints, engine)]
    return ["", 0]


@pytest.mark.parametrize("save_async", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_room_on_one_of_two_ranks_ends_both_with_the_reason(tmp_path, undisturbed, save_async):
    """A limit on the size of a file fails in the middle of a write, as a full disk does."""
    root = tmp_path / "run"
    found = run_ranks(cramped_rank, 2, tmp_path / "cramped", str(root), save_async)
    assert found[0] == found[1] and found[0][1] == 2
    assert found[0][0].startswith("rank 1 could not write") and "File too large" in found[0][0]
    checkpoints = RunDir(root).checkpoints
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000002", LATEST}
    assert run_ranks(zero_rank, 2, tmp_path / "goes on", str(root), "", 0) == [STEPS] * 2
    assert resumes(root) == [0, 2]
    assert_same(root, undisturbed)


# -----------------------------------------------------------------------------------------------
# Damage


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 6 and 8 that two ranks wrote; they differ in every value."""
    root, engine = tmp_path_factory.mktemp("two") / "run", single_engine(config_of())

    def work(ranks: ThreadRank) -> None:
        for step in (6, 8):
            whole = checkpoint.take_snapshot(step, engine, {})
            names = sorted(whole.tensors)[ranks.rank :: 2]
            part = {name: whole.tensors[name] + step for name in names}
            snapshot = checkpoint.Snapshot(whole.about, part)
            checkpoint.commit(RunDir(root).checkpoints, snapshot, ranks, keep_last=2)

    results(2, work)
    return root


def load(root: Path) -> tuple[int, TorchEngine]:
    engine = single_engine(config_of())
    return checkpoint.load_latest(RunDir(root).checkpoints, engine), engine


@pytest.mark.parametrize("lost", [0, 1])
def test_one_missing_file_of_two_makes_the_run_fall_back(tmp_path, of_two_ranks, lost):
    root = shutil.copytree(of_two_ranks, tmp_path / "run")
    (RunDir(root).checkpoints / f"step_00000008/rank_{lost:05d}.safetensors").unlink()
    step, engine = load(root)
    assert step == 6
    expected = read_state(of_two_ranks, 6)
    for fragment in engine.fragments():
        assert torch.equal(fragment.data, expected[f"{fragment.kind} {fragment.name}"])


@pytest.mark.parametrize("says", ["step_00000099\n", "nonsense", ""])
def test_a_pointer_to_nowhere_misleads_nobody(tmp_path, of_two_ranks, says):
    root = shutil.copytree(of_two_ranks, tmp_path / "run")
    (RunDir(root).checkpoints / LATEST).write_text(says)
    assert load(root)[0] == 8
    (RunDir(root).checkpoints / LATEST).unlink()
    assert load(root)[0] == 8
