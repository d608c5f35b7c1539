"""Runs on a real Slurm: submitted, saved near the time limit, requeued, without power, scaled.

The theorem is `Case.check`, whatever happened: `verify` finds nothing missing, nothing twice and
nothing corrupt, and the trainer has taken the planned sequence of samples.
"""

import json
import time

import pytest

from cluster.jobs import read_ids
from cluster.status import status
from distill.manifest import committed_steps

pytestmark = pytest.mark.slurm

APART = "cluster.slurm.train.options=[--exclusive]"  # the head's node has no teachers


@pytest.mark.timeout(600)  # half a minute on two idle cores
def test_a_run_is_submitted_once_and_trained_to_its_end(submitted, measured):
    case = submitted("train.max_steps=60", "cluster.slurm.teachers.nodes=1")
    start = time.time()
    case.submit()
    ids = read_ids(case.run)
    assert list(ids) == ["train", "teachers", "evaluate"]
    case.tell("scontrol", "hold", ids["evaluate"])  # it shall be there when the run is stopped
    assert "is submitted already" in case.submit()
    assert read_ids(case.run) == ids

    case.until_step(1)
    shown = json.loads(case.bowstring("status", str(case.run.root), "--json"))["slurm"]["jobs"]
    assert {job["kind"] for job in shown} == set(ids)
    case.finish()
    case.check()
    assert (case.run.slurm / "token").stat().st_mode & 0o777 == 0o600
    measured(f"from submit to the first step: {case.next_step_s(start):.1f} s")

    case.bowstring("stop", str(case.run.root))  # the evaluation
    case.until(lambda: all(job.state == "CANCELLED" for job in case.jobs("evaluate")))
    case.submit()
    assert list(read_ids(case.run)) == ["evaluate"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_saved_before_its_time_limit_and_goes_on(submitted, measured):
    """At most 20 steps a second are fed by one worker, so the limit comes in between."""
    case = submitted(
        "train.max_steps=3000",
        "train.save_every=1000",
        "train.log_every=10",
        "cluster.slurm.train.time='3:00'",
        "cluster.slurm.save_s=60",
        "cluster.slurm.teachers.nodes=1",
    )
    case.submit()
    case.until(lambda: case.train.restarts == 1, "FAILED", "CANCELLED", "TIMEOUT")
    queued = time.time()
    saved = max(committed_steps(case.run.checkpoints))
    assert saved % 1000 != 0  # by the signal
    case.until(lambda: len(case.events("resume")) == 2, "FAILED", "CANCELLED", "TIMEOUT")
    assert case.events("resume")[-1]["step"] == saved
    case.finish()
    case.check()
    measured(
        f"saved at step {saved}; from requeue to the next step: {case.next_step_s(queued):.1f} s"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fault", ["warning", "requeue", "teacher without power", "head without power"]
)
def test_a_run_survives(submitted, fault, measured):
    case = submitted("train.max_steps=600", APART)
    case.submit()
    case.until_step(30)
    struck, job = time.time(), case.train
    nodes = {task.node_list for task in case.jobs("teachers") if task.state == "RUNNING"}
    dead = ""
    match fault:
        case "warning":  # of a preemption, to the batch script alone
            case.tell("scancel", "--batch", "--signal=TERM", job.id)
        case "requeue":
            case.tell("scontrol", "requeue", job.id)
        case "teacher without power":
            dead = min(nodes)
        case "head without power":
            dead = job.node_list
            assert dead not in nodes
    if dead:
        case.cluster.mini("node-kill", dead)
    try:
        if fault == "teacher without power":
            case.until(lambda: any(task.restarts for task in case.jobs("teachers")), "FAILED")
            queued_s = time.time() - struck
        else:
            case.until(lambda: case.train.restarts == 1, "FAILED", "CANCELLED")
            queued_s = time.time() - struck
            case.until(lambda: len(case.events("resume")) == 2, "FAILED", "CANCELLED")
        case.finish()
    finally:
        if dead:
            case.cluster.mini("node-start", dead)
    case.check()
    measured(
        f"queued again after {queued_s:.1f} s, next step after "
        f"{case.next_step_s(struck + queued_s):.1f} s more"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_scaled_stopped_and_submitted_again(submitted, measured):
    """1 -> 3 -> 1 nodes of teachers; a stop saves and does not queue again."""
    case = submitted(
        "train.max_steps=1500", "train.save_every=500", "cluster.slurm.teachers.nodes=1"
    )
    case.submit()

    def teachers():
        running = [job for job in case.jobs("teachers") if job.state == "RUNNING"]
        return len(running), status(case.run)["teachers"]["workers"]

    case.until_step(10)
    for count in (3, 1):
        asked = time.time()
        case.bowstring("scale", str(case.run.root), str(count))
        case.until(lambda count=count: teachers() == (count, count), "FAILED", "COMPLETED")
        measured(f"{count} workers after {time.time() - asked:.1f} s")
    case.bowstring("stop", str(case.run.root))
    case.until(lambda: case.train.state == "FAILED")
    saved = max(committed_steps(case.run.checkpoints))
    assert saved % 500 != 0 and case.train.restarts == 0
    assert not any(job.is_there for job in case.jobs("teachers") + case.jobs("evaluate"))

    case.submit()
    case.finish()
    assert case.events("resume")[-1]["step"] == saved
    case.check()
    case.until(lambda: case.jobs("evaluate")[0].state == "COMPLETED")
    assert case.run.results.exists() and case.run.report.exists()
    assert "nothing left to do" in case.submit()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_on_two_nodes_are_one_group(submitted):
    """And the token of the run is used, not a stale one of the user's."""
    case = submitted(
        "train.max_steps=60",
        "cluster.trainer.num_workers=2",
        "cluster.slurm.train.nodes=2",
        "cluster.slurm.teachers.nodes=1",
    )
    home = case.folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("0" * 64)
    case.env["HOME"] = str(home)
    case.submit()
    case.finish()
    case.check()
    assert status(case.run)["train"]["world_size"] == 2
