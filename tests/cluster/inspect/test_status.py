"""Status from files: progress, open leases, speed, quarantines, the last whole checkpoint."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.inspect.status import (
    average_pairs_per_s,
    last_verified,
    open_leases,
    pairs_per_s,
    slurm_jobs,
    status,
)
from cluster.inspect.view import render, show_audit
from cluster.settings.file import save_config
from cluster.settings.hydra import compose
from cluster.state.evicted import evict
from distill.data.sidecar import Reason
from distill.report.cost import goodput
from distill.run.events import (
    Commit,
    Expire,
    Group,
    GroupWaits,
    Lease,
    Pool,
    Resume,
    Scale,
    WorkerJoin,
    WorkerLeave,
    append,
    read_history,
    replay,
)
from distill.run.files import RunDir, write_json
from distill.run.measured import Metrics, append_metrics, read_metrics
from distill.run.records import tree_of
from distill.testing import tiny_spec, write_tiny_shards

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    (config,) = compose(["experiment=tiny"])
    run = RunDir(Path(config.run.dir))
    save_config(run, config)
    return run


def test_a_fresh_run_has_done_nothing(run):
    found = status(run)
    assert (found["stage"], found["live"], found["train"]["step"]) == ("pretrain", False, 0)
    assert found["pretrain"]["step"] == 0  # its own teacher comes first
    assert (found["shards"]["committed"], found["shards"]["planned"]) == (0, 4)
    assert found["checkpoint"] is None
    assert found["shards"]["pairs_per_s"] is None


def test_a_run_in_the_middle(run):
    for shard in range(3):
        run.shards.mkdir(exist_ok=True)
        (run.shards / f"{shard:08d}.tar").write_bytes(bytes(1000))
        (run.shards / f"{shard:08d}.json").write_text("{}")
    (run.shards / "00000003.tar").write_bytes(bytes(10))  # no sidecar: not committed
    append_metrics(run, Metrics(2, loss=0.5, terms={"output": 0.5}))
    append_metrics(run, Metrics(4, loss=0.25, terms={"output": 0.25}))
    found = status(run)
    assert (found["stage"], found["train"]["step"], found["train"]["loss"]) == ("train", 4, 0.25)
    assert (found["shards"]["committed"], found["shards"]["bytes"]) == (3, 3000)
    # Step 4 of batch 16 has read 64 = one block of 2 shards of 16, twice: shard 2 is left.
    assert found["shards"]["backlog"] == 1
    assert "step 4 of 6" in shown(found)
    json.dumps(found)


def test_where_a_step_spends_its_time_is_shown(run):
    work = {"flops_per_s": 2e9, "mfu": 0.125, "peak_memory_bytes": 10**9}
    phases = {"data": 0.001, "forward": 0.02}
    append_metrics(run, Metrics(2, loss=0.5, phases_s=phases, **work))
    text = shown(status(run))
    for words in ("data 1 ms, forward 20 ms", "2e+09 FLOP/s", "12.5% of", "1,000,000,000 bytes"):
        assert words in text


def test_without_the_peak_of_the_device_the_work_is_no_share_of_anything(run):
    append_metrics(run, Metrics(2, loss=0.5, flops_per_s=2e9))
    text = shown(status(run))
    assert "2e+09 FLOP/s by formula" in text and "peak" not in text


def test_open_leases_are_those_without_an_end():
    events = [
        Lease(0, "a", time=0.0),
        Lease(1, "b", time=1.0),
        Lease(2, "c", time=2.0),
        Lease(3, "d", time=3.0),
        Commit(0, "a", 1, 1.0, time=4.0),
        WorkerLeave("b", "killed", time=5.0),
        Expire(2, "c", "no progress", time=6.0),
        Expire(None, "e", "its teachers were not loaded", time=7.0),
    ]
    left = [{"shard": 3, "worker": "d", "age_s": 7.0}]
    assert open_leases(replay(events), now=10.0) == left
    events.append(Pool(2, 4, time=8.0))  # everything was killed, and began anew
    assert open_leases(replay(events), now=10.0) == []


def a_shard_every(seconds, num):
    made = [Commit(n, "a", 1, seconds, time=seconds * n) for n in range(1, num + 1)]
    return [WorkerJoin("a", {}, time=0.0), *made]


def test_speed_counts_commits_over_the_last_minute():
    events = a_shard_every(10.0, 20)
    assert pairs_per_s(replay(events), samples_per_shard=50) == 5.0
    assert pairs_per_s(replay(events[:3]), samples_per_shard=50) == 5.0
    assert pairs_per_s(replay(events[:1]), samples_per_shard=50) is None


def test_the_speed_of_shards_that_take_longer_than_a_minute_is_known():
    events = a_shard_every(100.0, 3)
    assert pairs_per_s(replay(events), samples_per_shard=50) == 0.5
    assert pairs_per_s(replay(events[:2]), samples_per_shard=50) == 0.5


def test_the_speed_of_a_production_that_stands_still_falls():
    made = replay(a_shard_every(10.0, 20))
    speeds = [pairs_per_s(made, samples_per_shard=50, now=200.0 + s) for s in (0, 30, 120, 1000)]
    assert speeds[0] == 5.0 and speeds == sorted(speeds, reverse=True)
    assert 0 < speeds[-1] < 0.1


def test_average_speed_leaves_out_the_time_without_workers():
    def session(start, worker):
        shard = int(start)
        return [
            Pool(1, 4, time=start),
            WorkerJoin(worker, {}, time=start + 5),
            Lease(shard, worker, time=start + 5),
            Commit(shard, worker, 1, 10.0, time=start + 15),
            WorkerLeave(worker, "killed", time=start + 25),
        ]

    def average(events):
        return average_pairs_per_s(replay(events), samples_per_shard=60)

    events = [*session(0.0, "a"), *session(1000.0, "b")]
    for end in (-1, None):  # what comes after the last commit has made nothing yet
        assert average(events[:end]) == 2 * 60 / (20 + 10)
    assert average([*events[:-1], Scale(5, time=1500.0)]) == 2 * 60 / (20 + 10)
    assert average(events[:3]) is None


def test_the_finish_is_that_of_the_slower_side(run):
    with run.lock.open("w") as file:  # a live run of 6 steps and 4 shards of 16
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status(run)["left_s"] is None
        append_metrics(run, Metrics(2, loss=0.5, step_s=10.0))
        assert status(run)["left_s"] == 40.0
        assert "estimated finish" in shown(status(run)) and "0:00:40" in shown(status(run))
        append(run, WorkerJoin("a", {}, time=0.0), Commit(0, "a", 1, 1.0, time=50.0))
        assert status(run)["left_s"] == 4 * 50.0  # nothing on disk, so all four are still to come
    assert status(run)["left_s"] is None


def test_a_damaged_checkpoint_is_passed_over(run, write_checkpoint):
    write_checkpoint(run, 2)
    assert last_verified(run) == {"step": 2, "checked": "sha256", "newer_bad": []}
    folder = write_checkpoint(run, 4)
    assert last_verified(run) == {"step": 4, "checked": "sha256", "newer_bad": []}
    (folder / "rank_00000.safetensors").write_bytes(b"Weights" * 4)
    assert last_verified(run) == {"step": 2, "checked": "sha256", "newer_bad": [4]}


def test_a_quarantined_shard_is_shown_with_its_reason(run):
    folder = run.quarantine / "00000002-abc"
    write_json(folder / "00000002.reason.json", tree_of(Reason(2, "sha256 differs")))
    write_json(run.quarantine / "00000003-abc" / "00000003.reason.json", {"shard": 3})
    assert status(run)["shards"]["quarantined"] == [
        {"shard": 2, "reason": "sha256 differs"},
        {
            "shard": "00000003",
            "reason": "the reason in quarantine/00000003-abc lacks the field 'reason'",
        },
    ]


def shown(found):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render(found))
    return capture.get()


def test_what_the_trainer_waits_for_is_shown_while_the_run_is_live(run):
    write_json(run.cursor, {"block": 3, "waiting_for": "block 3: shard 7 is not there yet"})
    assert status(run)["waiting_for"] is None
    assert "shard 7" not in shown(status(run))
    with run.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = status(run)
        assert found["waiting_for"] == "block 3: shard 7 is not there yet"
        assert "shard 7 is not there yet" in shown(found)
        write_json(run.cursor, {"block": 3, "waiting_for": ""})
        assert status(run)["waiting_for"] is None
        append(run.teacher, GroupWaits())  # the stage is pretrain
        assert "nodes with room for its ranks" in shown(status(run))
        append(run.teacher, Group(1))
        assert status(run)["waiting_for"] is None
        append_metrics(run, Metrics(1))
        append(run, GroupWaits())
        assert "nodes with room for its ranks" in shown(status(run))


def test_goodput_is_the_time_of_steps_that_count_over_the_wall_time(run):
    assert status(run)["train"]["goodput"] is None
    speed = {"step_s": 1.0, "data_wait_fraction": 0.5, "loss": 0.1}
    append(run, Resume(0, 1, time=100.0), Resume(2, 1, time=110.0))
    for time_s, step in ((102.0, 2), (104.0, 4), (120.0, 6)):  # 4 is lost: it went on from step 2
        append_metrics(run, Metrics(step, **speed, time=time_s))
    # 6 steps of 1 s count, half of it waiting, in the 20 s from 100 to 120.
    found = status(run)
    assert found["train"]["goodput"] == pytest.approx(3 / 20)
    assert "15.0%" in shown(found)
    assert goodput(read_history(run), read_metrics(run), now=130.0) == pytest.approx(3 / 30)


def test_teacher_workers_wanted_and_at_work_are_shown_while_the_run_is_live(run):
    append(run, Pool(1, 4), WorkerJoin("killed with its supervisor", {}))
    append(run, Pool(1, 4), WorkerJoin("a", {}), Scale(3), WorkerJoin("b", {}))
    append(run, WorkerLeave("a", "killed by signal 9"))
    assert status(run)["teachers"] is None
    with run.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = status(run)
        assert found["teachers"] == {"target": 3, "workers": 1}
        assert "1 of 3 wanted" in shown(found)


def test_evicted_shards_count_and_are_told(run):
    write_tiny_shards(run, tiny_spec(), range(3))
    evict(run, (0, 1), step=4)
    found = status(run)["shards"]
    assert (found["committed"], found["evicted"]) == (3, 2)
    assert found["bytes"] == run.tar(2).stat().st_size
    assert "2 of them deleted for room" in shown(status(run))


def test_finished_needs_results_newer_than_the_training(run):
    append_metrics(run, Metrics(6, loss=0.1))
    assert status(run)["stage"] == "evaluate"
    time.sleep(0.02)
    write_json(run.results, {})
    assert status(run)["stage"] == "finished"


def test_audit_exit_code(capsys):
    assert show_audit({"ok": True, "missing": []}, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "missing": []}
    found = {"missing": [{"shard": 3, "first_id": 48}], "checkpoints": {"bad": [], "verified": [4]}}
    assert show_audit({"ok": False, **found}, as_json=False) == 1
    text = capsys.readouterr().out
    assert "NOT WHOLE" in text and "shard 3, first_id 48" in text and "{" not in text
    assert "checkpoints.verified" in text


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_watch_shows_what_changes_until_it_is_interrupted(run, form):
    """In a terminal, as a user sees it."""
    append_metrics(run, Metrics(2, loss=0.5))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cluster.cli.main", "status", str(run.root.resolve())]
    watch = subprocess.Popen(
        [*command, "--watch", "0.1", *form],
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        # A job in the background of a shell ignores it, and so would a process that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    text = b""
    for loss in (0.5, 0.25, 0.125):
        append_metrics(run, Metrics(4, loss=loss))
        while str(loss).encode() not in text:
            text = text[-4096:] + os.read(ours, 4096)
    watch.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the terminal is closed
        while os.read(ours, 4096):
            pass
    assert watch.wait(timeout=30) == 130


def test_what_its_jobs_said_last_is_shown_also_where_there_is_no_slurm(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    write_json(run.slurm / "jobs.json", {"train": "7"})
    (run.slurm / "logs").mkdir()
    (run.slurm / "logs" / "train-7.log").write_text("error: Ray's head did not start\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = slurm_jobs(run)
    assert found["jobs"] == [] and "squeue is not here" in found["unknown"]
    assert found["said"] == ["train 7: error: Ray's head did not start"]
