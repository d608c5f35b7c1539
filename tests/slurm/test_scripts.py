"""The batch scripts on a real Slurm, with stand-ins for `ray` and `bowstring run` that do nothing.

So only what the scripts decide is tested, and it takes seconds: signals, requeues, who follows
whom.
"""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from cluster.plan.nodes import share
from cluster.settings.hydra import compose
from cluster.slurm.jobs import read_ids, read_jobs
from cluster.slurm.site import read_nodes, shape_for
from cluster.supervisor.arrays import Arrays
from distill.run.events import Exclude, append

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

RAY = """#!/bin/bash
echo "ray $*"; echo "Ray runtime started"
[[ "$*" =~ --temp-dir=([^ ]*) ]] && mkdir "${BASH_REMATCH[1]}"
trap 'exit 0' TERM
while :; do sleep 1 & wait $!; done
"""
# The first time on each node it gives up.
RAY_AT_LAST = RAY.replace("\n", '\nmkdir "$0-$SLURMD_NODENAME" 2>/dev/null && exit 1\n', 1)
RAY_NEVER = """#!/bin/bash
[[ "$*" =~ --temp-dir=([^ ]*) ]] && mkdir -p "${BASH_REMATCH[1]}/session_latest/logs"
echo "no memory" >"${BASH_REMATCH[1]}/session_latest/logs/raylet.out"
exit 1
"""
# The head listens. Others give up until they may start.
RAY_LISTENS = """#!/bin/bash
echo "ray $*"
[[ "$*" =~ --head || -e "$0-may" ]] || exit 1
echo "Ray runtime started"
[[ "$*" =~ --temp-dir=([^ ]*) ]] && mkdir "${BASH_REMATCH[1]}"
[[ "$*" =~ --port=([0-9]+) ]] || exec sleep 600
exec python3 -c "import socket, time; s = socket.create_server(('', ${BASH_REMATCH[1]})); time.sleep(600)"
"""  # noqa: E501
SUPERVISOR = """#!/bin/bash
echo "supervisor at $RAY_ADDRESS"
trap 'sleep 1; echo saved; exit 0' TERM
while [ ! -e "$2/../done" ]; do sleep 0.2 & wait $!; done
"""
# It ends with 75 the first time, told to or not: steps are lost.
LOSES = """#!/bin/bash
echo "supervisor at $RAY_ADDRESS"
trap 'exit 75' TERM
while [ ! -e "$2/../done" ]; do
  if [ -e "$2/../lose" ]; then rm "$2/../lose"; exit 75; fi
  sleep 0.2 & wait $!
done
"""
TWO_ARRAYS = """
defaults: [slurm, _self_]
slurm:
  more_teachers:
    spot: {partition: spot, nodes: 1, max_nodes: 1, workers_per_node: 2}
"""
APART = "cluster.slurm.train.options=[--exclusive]"


@pytest.fixture
def scratch():
    """A folder with a short name, which the nodes share."""
    with tempfile.TemporaryDirectory(prefix="bow", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def case(submitted, scratch):
    """Makes runs whose jobs find the stand-ins."""

    def make(*settings, ray=RAY, supervisor=SUPERVISOR, flags=()):
        place = f"cluster.slurm.scratch={scratch}"
        case = submitted("cluster.slurm.teachers.nodes=1", place, *settings)
        folder = case.folder / "bin"
        folder.mkdir()
        for name, text in (("ray", ray), ("bowstring", supervisor)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        case.env["PATH"] = f"{folder}:{case.env['PATH']}"
        case.submit(*flags)
        if ray is not RAY_NEVER:
            case.until(lambda: case.said("supervisor at") == 1)
        return case

    return make


def finish(case):
    (case.folder / "done").touch()
    case.until(lambda: case.train.state == "COMPLETED")
    assert (case.run.slurm / "head").read_text() == "ended\n"
    scratch = Path(case.config.cluster.slurm.scratch)
    case.until(lambda: list(scratch.iterdir()) == [])


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_signal_saves_and_queues_again_and_teachers_rejoin(case, number):
    case = case()
    case.until(lambda: case.said("joining", "teachers") == 1)
    case.tell("scancel", "--batch", f"--signal={number}", case.train.id)
    case.until(lambda: case.said("supervisor at") == 2)
    assert case.train.restarts == 1 and case.said("train: queued again") == 1
    case.until(lambda: case.said("joining", "teachers") == 2)
    finish(case)
    case.until(lambda: not any(job.is_there for job in case.jobs("teachers")))
    assert case.said("the run has ended", "teachers") == 1


def test_a_supervisor_that_has_lost_steps_is_queued_again(case):
    case = case(supervisor=LOSES)
    case.tell("scancel", "--batch", "--signal=USR1", case.train.id)
    case.until(lambda: case.said("supervisor at") == 2)
    (case.folder / "lose").touch()  # stopped by a signal that only its ranks got
    case.until(lambda: case.said("supervisor at") == 3)
    assert case.train.restarts == 2 and case.said("train: queued again") == 2
    finish(case)


def test_ray_is_started_again_where_it_gave_up(case):
    two = ("cluster.trainer.num_workers=2", "cluster.slurm.train.nodes=2")
    case = case(*two, ray=RAY_AT_LAST)
    logs = case.run.slurm / "logs"
    case.until(lambda: "started" in "".join(f.read_text() for f in logs.glob("*.0-node2.txt")))
    assert case.said("supervisor at") == 1 and case.train.restarts == 0
    finish(case)


def test_of_a_ray_that_does_not_start_the_words_are_kept(case):
    case = case(ray=RAY_NEVER)
    case.until(lambda: case.train.state == "FAILED")
    kept = list(case.run.logs.glob(f"{case.train.id}.0/{case.train.node_list}/ray/*"))
    assert [path.read_text() for path in kept] == ["no memory\n"]
    assert case.said(f"Ray's own logs are in {case.run.logs / case.train.id}.0") == 1
    case.until(lambda: not any(job.is_there for job in read_jobs(case.run)))


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
    case.cluster.preempt([case.train.node_list], 1)
    case.until(lambda: case.said("supervisor at") == 2)
    assert case.said("\nsaved\n") == 1 and case.said("DUE TO PREEMPTION") == 0
    finish(case)


def test_each_job_of_a_chain_goes_on_and_the_one_that_finishes_ends_it(case):
    """For a site that lets no job queue itself again."""
    case = case(flags=("--chain", "3"))
    ids = read_ids(case.run)
    assert list(ids) == ["train", "train.2", "train.3", "teachers", "evaluate"]
    case.tell("scancel", "--batch", "--signal=USR1", ids["train"])
    case.until(lambda: case.said("supervisor at") == 2)
    case.until(lambda: {job.id: job.state for job in case.jobs("train")}[ids["train"]] == "FAILED")
    assert all(job.restarts == 0 for job in case.jobs("train"))
    assert case.said("the next job of the chain goes on") == 1
    (case.folder / "done").touch()
    case.until(lambda: not any(job.is_there for job in read_jobs(case.run)))
    states = {job.id: job.state for job in read_jobs(case.run)}
    assert states[ids["train.2"]] == states[ids["evaluate"]] == "COMPLETED"
    assert states[ids["train.3"]] == "CANCELLED" and case.said("supervisor at") == 2


def test_a_stop_ends_a_chain(case):
    case = case(flags=("--chain", "2"))
    case.bowstring("stop", str(case.run.root))
    case.until(lambda: not any(job.is_there for job in read_jobs(case.run)))
    assert case.said("\nsaved\n") == 1 and case.said("supervisor at") == 1


def test_a_task_of_the_teachers_that_is_told_to_leave_is_queued_again_alone(case):
    """Of all, the one to which Slurm gave the id of the whole array too."""
    case = case("cluster.slurm.teachers.nodes=3", "cluster.slurm.teachers.max_nodes=3")
    case.until(lambda: case.said("joining", "teachers") == 3)
    last = f"{read_ids(case.run)['teachers']}_2"
    case.tell("scancel", "--batch", "--signal=USR1", last)
    case.until(lambda: case.said("joining", "teachers") == 4)
    assert {job.id: job.restarts for job in case.jobs("teachers") if job.restarts} == {last: 1}
    finish(case)


def test_a_sick_node_is_left_out_where_slurm_starts_a_job_again(case, request):
    """Also by a submit; and all of them are taken where no others would do."""
    if request.config.getoption("--moody", default=""):
        pytest.skip("NOT TESTED: Slurm must answer between a requeue and the end of the script")
    case = case(APART, "cluster.slurm.teachers.max_nodes=1")
    case.until(lambda: case.said("joining", "teachers") == 1)
    (sick,), (also,) = [case.train.node_list], case.teacher_nodes
    (case.run.slurm / "sick").write_text(f"{sick}\n{also}\n")
    case.tell("scancel", "--batch", "--signal=USR1", case.train.id)
    case.until(lambda: case.said("supervisor at") == 2)
    assert case.train.node_list not in (sick, also)
    assert case.said(f"leaves out {sick},{also}") == 1
    case.tell("scancel", "--batch", "--signal=USR1", read_ids(case.run)["teachers"] + "_0")
    case.until(lambda: case.said("leaves out", "teachers") == 1)
    case.until(lambda: any(job.restarts and job.node_list for job in case.jobs("teachers")))
    assert {*case.teacher_nodes}.isdisjoint({sick, also})

    case.bowstring("stop", str(case.run.root))
    case.until(lambda: not any(job.is_there for job in read_jobs(case.run)))
    append(case.run, Exclude(sick, "", "values that are not finite"), Exclude("elsewhere", "", "x"))
    said = case.submit()
    assert said.count(f"leaves out {sick}, which failed: values that are") == 3
    case.until(lambda: case.said("supervisor at") == 3)
    assert case.train.node_list != sick
    case.bowstring("stop", str(case.run.root))
    case.until(lambda: not any(job.is_there for job in read_jobs(case.run)))
    append(case.run, *(Exclude(f"node{n}", "", "no memory") for n in range(1, 5)))
    assert "leaves out" not in case.submit()


def test_preempted_teachers_come_back_and_the_trainer_goes_on(case):
    case = case("cluster.slurm.teachers.partition=spot", APART)
    case.until(lambda: case.said("joining", "teachers") == 1)
    case.cluster.preempt(case.teacher_nodes, 1)
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


def batch_shell(job, node):
    """Pid of the script of a job on a node, as seen from this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_text().split("\0")
            command = (folder / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):  # it has ended, or is none of ours
            continue
        if {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}"} <= {*environment} and any(
            word.endswith("slurm_script") for word in command
        ):
            return int(folder.name)
    raise ProcessLookupError(f"{job} on {node}")


def test_a_start_that_was_cut_off_does_not_end_the_one_that_followed(case):
    """It is told to end when its node is reached again, before Slurm removes what is left of it."""
    case = case(APART)
    if not case.cluster.has_cables:
        pytest.skip("NOT TESTED, a cable that is cut: nodes have no network of their own here")
    case.until(lambda: case.said("joining", "teachers") == 1)
    job, cut_off = case.train.id, case.train.node_list
    case.cluster.mini("link-down", cut_off)
    try:
        case.until(lambda: case.said("supervisor at") == 2)
        case.until(lambda: case.said("joining", "teachers") == 2)
        head = (case.run.slurm / "head").read_text()
    finally:
        case.cluster.mini("link-up", cut_off)
    os.kill(batch_shell(job, cut_off), signal.SIGTERM)
    case.until(lambda: case.said("SIGTERM") == 1)
    case.until(lambda: case.said("\nsaved\n") == 1)
    time.sleep(10)
    assert (case.run.slurm / "head").read_text() == head
    assert case.train.restarts == 1 and case.train.node_list != cut_off
    assert case.said("joining", "teachers") == 2
    finish(case)


def test_teachers_that_cannot_start_ray_beside_a_head_try_on(case):
    """To hold them would leave the trainer without data: only its next start releases them."""
    case = case("cluster.slurm.patience_s=5", ray=RAY_LISTENS)
    case.until(lambda: case.said("joining", "teachers") >= 6)
    assert all(job.reason == "None" for job in case.jobs("teachers") if job.state == "RUNNING")
    assert case.said("held", "teachers") == 0
    (case.folder / "bin" / "ray-may").touch()
    logs = case.run.slurm / "logs"
    case.until(lambda: any("--address" in path.read_text() for path in logs.glob("*-node?.txt")))
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


def test_teachers_leave_when_all_shards_are_made_and_come_back_when_some_are_lost(
    case, monkeypatch
):
    case = case("cluster.slurm.teachers.nodes=2", "cluster.slurm.teachers.max_nodes=3")
    case.until(lambda: case.said("joining", "teachers") == 2)

    def all_are_held():
        tasks = case.jobs("teachers")
        return all(t.state == "PENDING" and "held" in t.reason.lower() for t in tasks)

    arrays = Arrays(case.run)
    arrays.follow(False)
    arrays.follow(True)
    case.until(all_are_held)
    assert case.said("all shards are made", "teachers") >= 2 and case.train.state == "RUNNING"
    monkeypatch.setattr("cluster.supervisor.arrays.AGAIN_S", 1.0)
    arrays.follow(False)
    case.until(lambda: case.said("joining", "teachers") == 4)
    case.until(lambda: not any((case.run.slurm / "held").iterdir()))
    arrays.follow(True)
    case.until(all_are_held)
    finish(case)
    case.until(lambda: not any(job.is_there for job in case.jobs("teachers")))


def test_the_array_is_throttled_by_scale(case):
    case = case()

    def running():
        return sum(job.state == "RUNNING" for job in case.jobs("teachers"))

    for count in (4, 1, 0, 2, 0):
        case.bowstring("scale", str(case.run.root), str(count))
        case.until(lambda count=count: running() == count)
    finish(case)  # and with it an array that is held
    case.until(lambda: not any(job.is_there for job in case.jobs("teachers")))


def test_two_arrays_of_teachers_are_scaled_and_stopped_as_one(case, tmp_path):
    site = tmp_path / "sites" / "cluster" / "two.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(TWO_ARRAYS)
    case = case("cluster=two", "--config-dir", str(site.parents[1]))
    ids = read_ids(case.run)
    assert list(ids) == ["train", "teachers", "teachers.spot", "evaluate"]

    def running():
        there = [job for job in case.jobs("teachers") if job.state == "RUNNING"]
        return [sum(job.array == ids[kind] for job in there) for kind in list(ids)[1:3]]

    for count, tasks in ((3, [3, 0]), (5, [4, 1]), (2, [2, 0])):
        case.bowstring("scale", str(case.run.root), str(count))
        case.until(lambda tasks=tasks: running() == tasks)
    with pytest.raises(
        AssertionError, match="7 teacher workers are more than the 6 of teachers and"
    ):
        case.bowstring("scale", str(case.run.root), "7")
    case.bowstring("stop", str(case.run.root))
    case.until(lambda: not any(job.is_there for job in read_jobs(case.run)))


def test_nodes_are_read_from_slurm_and_a_job_that_no_node_holds_is_refused(submitted):
    """Nodes here have four cores and no GPU."""
    found = [nodes for nodes in read_nodes() if nodes.partition == "main"]
    assert [(each.num, each.shape.cpus, each.shape.gpus) for each in found] == [(4, 4, 0)]
    ranks = ("cluster.trainer.num_workers=8", "train.batch_size=8", "cluster.slurm.train.nodes=0")
    (config,) = compose(
        ["experiment=tiny", "cluster=slurm", "cluster.trainer.cpus_per_worker=2", *ranks]
    )
    shape = shape_for(read_nodes(), config.cluster.slurm, "train", on_gpu=False)
    assert share(config, "train", shape).nodes == 4
    case = submitted("cluster.slurm.train.node.cpus=64")
    with pytest.raises(
        AssertionError, match=r"no node of the default partition, .* 0 GPUs, 4 core"
    ):
        case.submit()
    assert not case.run.slurm.exists()


def test_a_job_that_cannot_run_is_refused_before_any_is_submitted(submitted):
    case = submitted("cluster.slurm.evaluate.partition=none")
    with pytest.raises(AssertionError, match=r"(?i)invalid partition"):
        case.submit()
    assert not (case.run.slurm / "jobs.json").exists()
