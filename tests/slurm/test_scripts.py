"""The batch scripts on a real Slurm, with stand-ins for `ray` and `bowstring run` that do nothing.

So only what the scripts decide is tested, and it takes seconds: signals, requeues, who follows
whom.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from cluster.jobs import read_ids, read_jobs

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

RAY = """#!/bin/bash
echo "ray $*"; echo "Ray runtime started"
[[ "$*" =~ --temp-dir=([^ ]*) ]] && mkdir "${BASH_REMATCH[1]}"
trap 'exit 0' TERM
while :; do sleep 1 & wait $!; done
"""
SUPERVISOR = """#!/bin/bash
echo "supervisor at $RAY_ADDRESS"
trap 'sleep 1; echo saved; exit 0' TERM
while [ ! -e "$2/../done" ]; do sleep 0.2 & wait $!; done
"""
APART = "cluster.slurm.train.options=[--exclusive]"


@pytest.fixture
def scratch():
    """A folder with a short name, which the nodes share."""
    with tempfile.TemporaryDirectory(prefix="bow", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def case(submitted, tmp_path, scratch):
    """Makes runs whose jobs find the stand-ins."""

    def make(*settings):
        place = f"cluster.slurm.scratch={scratch}"
        case = submitted("cluster.slurm.teachers.nodes=1", place, *settings)
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in (("ray", RAY), ("bowstring", SUPERVISOR)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        case.env["PATH"] = f"{folder}:{os.environ['PATH']}"
        case.submit()
        case.until(lambda: case.said("supervisor at") == 1)
        return case

    return make


def finish(case):
    (case.folder / "done").touch()
    case.until(lambda: case.train.state == "COMPLETED")
    assert (case.run.slurm / "head").read_text() == "ended\n"
    scratch = Path(case.config.cluster.slurm.scratch)
    case.until(lambda: list(scratch.iterdir()) == [])


def preempt(nodes):
    """Submits a short job that takes that many nodes from jobs in partition `spot`."""
    job = [f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(["sbatch", "--partition=high", *job], check=True, capture_output=True)


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_signal_saves_and_queues_again_and_teachers_rejoin(case, number):
    case = case()
    case.until(lambda: case.said("joining", "teachers") == 1)
    case.tell("scancel", "--batch", f"--signal={number}", case.train.id)
    case.until(lambda: case.said("supervisor at") == 2)
    assert case.train.restarts == 1 and case.said("saved, and queued again") == 1
    case.until(lambda: case.said("joining", "teachers") == 2)
    finish(case)
    case.until(lambda: not any(job.is_there for job in case.jobs("teachers")))
    assert case.said("the run has ended", "teachers") == 1


def test_a_time_limit_that_leaves_no_time_for_a_step_ends_the_run(case):
    """A checkpoint in between counts from the start again."""
    case = case()
    for start in range(1, 6):
        case.until(lambda start=start: case.said("supervisor at") == start)
        if start == 2:
            (case.run.checkpoints / "step_00000007").mkdir(parents=True)
        case.tell("scancel", "--batch", "--signal=USR1", case.train.id)
    case.until(lambda: case.train.state == "FAILED")
    assert case.train.restarts == 4 and case.said("without a new checkpoint") == 1
    case.until(lambda: not any(job.is_there for job in read_jobs(case.run)))
    (case.run.checkpoints / "step_00000007").rmdir()  # it holds nothing
    case.submit()
    case.until(lambda: case.said("supervisor at") == 6)


def test_a_stop_saves_and_does_not_queue_again_and_a_submit_goes_on(case):
    case = case()
    case.bowstring("stop", str(case.run.root))
    case.until(lambda: case.train.state == "FAILED")
    assert case.train.restarts == 0 and case.said("\nsaved\n") == 1
    assert not any(job.is_there for job in read_jobs(case.run))
    case.submit()
    case.until(lambda: case.said("supervisor at") == 2)
    finish(case)


def test_a_submit_after_a_trainer_was_cancelled_by_hand_replaces_all_jobs(case):
    case = case("cluster.slurm.teachers.nodes=2")
    case.until(lambda: case.said("joining", "teachers") == 2)
    before = read_ids(case.run)
    case.tell("scancel", case.train.id)
    case.until(lambda: case.train.state == "CANCELLED")
    case.submit()
    assert set(read_ids(case.run).values()).isdisjoint(before.values())
    case.until(lambda: case.said("supervisor at") == 2)
    case.until(lambda: case.said("joining", "teachers") == 4)
    finish(case)


def test_the_grace_time_of_a_preemption_is_used_to_save(case):
    """Slurm tells the steps only, and ends the job 30 s later."""
    case = case("cluster.slurm.train.partition=spot", APART)
    preempt(nodes=4)
    case.until(lambda: case.said("supervisor at") == 2)
    assert case.said("\nsaved\n") == 1 and case.said("DUE TO PREEMPTION") == 0
    finish(case)


def test_a_task_of_the_teachers_that_is_told_to_leave_is_queued_again_alone(case):
    """Of all, the one to which Slurm gave the id of the whole array too."""
    case = case("cluster.slurm.teachers.nodes=3", "cluster.slurm.teachers.max_nodes=3")
    case.until(lambda: case.said("joining", "teachers") == 3)
    last = f"{read_ids(case.run)['teachers']}_2"
    case.tell("scancel", "--batch", "--signal=USR1", last)
    case.until(lambda: case.said("joining", "teachers") == 4)
    assert {job.id: job.restarts for job in case.jobs("teachers") if job.restarts} == {last: 1}
    finish(case)


def test_preempted_teachers_come_back_and_the_trainer_goes_on(case):
    case = case("cluster.slurm.teachers.partition=spot", APART)
    case.until(lambda: case.said("joining", "teachers") == 1)
    preempt(nodes=3)
    case.until(lambda: case.said("joining", "teachers") == 2)
    assert case.train.restarts == 0 and case.said("supervisor at") == 1
    finish(case)


def test_a_run_may_end_while_the_controller_is_gone(case):
    case = case()
    case.until(lambda: case.said("joining", "teachers") == 1)
    time.sleep(6)  # the controller writes its state every 5 s
    case.cluster.mini("ctld-kill")
    try:
        (case.folder / "done").touch()
        while not case.said("supervisor ended with 0"):
            time.sleep(0.1)
    finally:
        case.cluster.mini("ctld-start")
    finish(case)
    assert case.train.restarts == 0 and case.said("supervisor at") == 1


def test_teachers_follow_the_head_to_another_node(case):
    case = case(APART)
    case.until(lambda: case.said("joining", "teachers") == 1)
    dead = case.train.node_list
    case.cluster.mini("node-kill", dead)
    try:
        case.until(lambda: case.said("joining", "teachers") == 2)
    finally:
        case.cluster.mini("node-start", dead)
    assert case.train.node_list != dead and case.said("supervisor at") == 2
    finish(case)


def test_teachers_without_a_head_hold_their_array_until_there_is_one(case):
    case = case("cluster.slurm.patience_s=5", "cluster.slurm.teachers.max_nodes=3")
    case.until(lambda: case.said("joining", "teachers") == 1)
    case.tell("scontrol", "requeuehold", case.train.id)
    case.until(lambda: all("Held" in job.reason for job in case.jobs("teachers")))
    assert case.said("no head for 5 s", "teachers") == 1
    case.tell("scontrol", "release", case.train.id)
    case.until(lambda: case.said("supervisor at") == 2)
    case.until(lambda: case.said("joining", "teachers") == 2)
    finish(case)


def test_the_array_is_throttled_by_scale(case):
    case = case()

    def running():
        return sum(job.state == "RUNNING" for job in case.jobs("teachers"))

    for count in (4, 1, 0, 2):
        case.bowstring("scale", str(case.run.root), str(count))
        case.until(lambda count=count: running() == count)
    finish(case)


def test_a_job_that_cannot_run_is_refused_before_any_is_submitted(submitted):
    case = submitted("cluster.slurm.evaluate.partition=none")
    with pytest.raises(AssertionError, match=r"(?i)invalid partition"):
        case.submit()
    assert not (case.run.slurm / "jobs.json").exists()
