"""The trainer under faults: its nodes come and go, and a rank stands still."""

import time

import pytest

from cluster.state.cursor import read_cursor
from cluster.state.workers import write_target
from distill.checkpoint.manifest import committed_steps
from distill.run.files import read_lines


@pytest.fixture
def elastic(chaos, nodes):
    """(settings) -> a started run of one or two ranks on two machines, and the second of these."""

    def start(*settings):
        head, node = nodes(trainer=1, teacher=1), nodes(trainer=1)
        case = chaos(
            f"cluster.address={head.address}",
            "cluster.trainer.num_workers=[1,2]",
            "cluster.teachers.num_workers=1",
            *settings,
        )
        case.env = nodes.env
        case.start()
        return case, node

    return start


@pytest.mark.slow
@pytest.mark.timeout(900)  # 4 minutes on two idle cores, one of them waiting
def test_a_node_of_the_trainer_is_lost_and_another_one_comes(elastic, nodes, measured):
    """Two ranks on two machines; kill -9 of one, and one rank goes on; a new one, and there are two
    again. The new ones begin where the one rank stopped.
    """
    case, node = elastic(
        "train.max_steps=3000",  # one worker feeds some 20 a second
        "train.save_every=100",
    )
    case.until_step(40)
    killed = time.time()
    node.kill()
    case.until(lambda: len(case.events("resume")) == 2)
    alone = case.events("resume")[1]["time"]
    case.until(lambda: case.next_event_s(alone, "steps") > 0)
    steps_s = alone - killed + case.next_event_s(alone, "steps")
    measured(f"on one rank: the next steps after {steps_s:.1f} s")
    nodes(trainer=1)
    case.until(lambda: len(case.events("resume")) == 3)
    grown = time.time()
    case.finish()

    assert [event["ranks"] for event in case.events("group")] == [2, 1, 2]
    resumed = case.events("resume")
    assert [event["world_size"] for event in resumed] == [2, 1, 2]
    taken = [event for event in case.events("steps") if event["time"] < grown]
    assert resumed[2]["step"] == taken[-1]["last"] + 1  # it saved before it made way
    case.check_data()
    ours, theirs = losses(case.run), losses(case.alone)
    for step in range(1, resumed[2]["step"] + 100):  # later, rounding has grown
        assert ours[step] == pytest.approx(theirs[step], rel=0.01), step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_dies_while_its_ranks_start(elastic, measured):
    """Ray would ask for the lost node's rank for ever; the group goes on with those that fit."""
    case, node = elastic()
    case.until(lambda: len(case.events("group")) == 1)
    struck = time.time()
    node.kill()
    case.until(lambda: len(case.events("group")) == 2)
    measured(f"the next group after {case.events('group')[1]['time'] - struck:.1f} s")
    case.finish()
    assert [event["ranks"] for event in case.events("group")] == [2, 1]
    assert len(case.events("restart")) == 1
    case.check_data()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stop_while_the_trainer_waits_for_teachers_loses_no_step(chaos, measured):
    case = chaos(
        "cluster.teachers.num_workers=1", "train.max_steps=1500", "train.save_every=100000"
    )
    case.start()
    case.until_step(10)
    write_target(case.run, 0)
    case.until(lambda: read_cursor(case.run).waiting_for.endswith("is not there yet"))
    time.sleep(3)  # none was on its way
    assert read_cursor(case.run).waiting_for.endswith("is not there yet")
    told = time.time()
    case.supervisor.terminate()
    case.finish()
    measured(f"ended {time.time() - told:.1f} s after the signal")
    taken = case.events("steps")[-1]["last"] + 1
    assert list(committed_steps(case.run.checkpoints)) == [taken] and 10 <= taken < 1500
    case.start()
    case.finish()
    assert [event["step"] for event in case.events("resume")] == [0, taken]
    case.check()


def losses(run):
    """Loss by step; of steps that were done again the last."""
    return {record["step"]: record["loss"] for record in read_lines(run.metrics)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_stands_still_is_found_and_the_group_goes_on(chaos, measured):
    """One of two ranks is stopped in its tracks; the other one waits for it in a collective."""
    case = chaos(
        "cluster.trainer.num_workers=2", "cluster.trainer.step_timeout_s=90", "train.max_steps=240"
    )
    case.start()
    case.until_step(20)
    struck = time.time()
    case.processes("RayTrainWorker")[0].suspend()
    case.until(lambda: len(case.events("restart")) == 1)
    measured(f"found after {time.time() - struck:.1f} s")
    case.finish()
    (restart,) = case.events("restart")
    assert restart["error"].startswith("no step for more than 90 s")
    stacks = [path.read_text() for path in case.run.hangs.iterdir()]
    assert any("all_reduce" in text or "gather" in text for text in stacks), stacks
    measured(f"the next steps after {case.next_event_s(struck, 'steps'):.1f} s")
    case.check_data()
