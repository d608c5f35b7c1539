"""Nodes that come and go, as real raylets under token authentication: the pool follows them."""

import secrets
import signal
import subprocess
import time

import pytest

from cluster.inspect.status import status
from cluster.inspect.verify import audit
from distill.run.events import PLANNED

JOIN_S = 60.0  # 15 s on a machine that has cores left for the new workers


@pytest.mark.timeout(600)
def test_workers_come_and_go_with_their_nodes(chaos, nodes, measured):
    """One worker; a node brings two more; kill -9 of the node costs a shard per worker at most.

    The head says that it has a GPU, the node has none: its workers compute on CPU.
    """
    head = nodes(gpus=1, trainer=1, teacher=1)
    case = chaos(
        f"cluster.address={head.address}",
        "cluster.teachers.num_workers=1",
        "cluster.teachers.gpus_per_worker=0.5",
        "train.max_steps=40000",
    )
    case.env = nodes.env

    def workers():
        return status(case.run)["teachers"] if case.run.events.exists() else None

    stranger = nodes.env | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = subprocess.run(
        [nodes.ray, "status", f"--address={head.address}"],
        env=stranger,
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0 and "uthenticat" in refused.stdout + refused.stderr

    case.start("generate")
    case.until(lambda: workers() == {"target": 1, "workers": 1})
    node = nodes(teacher=2)
    joined = time.time()
    case.until(lambda: workers() == {"target": 3, "workers": 3})
    to_join_s = time.time() - joined
    before = len(case.events("commit"))
    case.until(lambda: len(case.events("commit")) > before + 10)

    lost = {event["worker"] for event in case.events("worker_join")[1:]}
    killed = time.time()
    node.kill()
    case.until(lambda: workers() == {"target": 1, "workers": 1})
    to_notice_s = time.time() - killed
    before = len(case.events("commit"))
    case.until(lambda: len(case.events("commit")) > before + 10)
    case.supervisor.send_signal(signal.SIGTERM)
    case.finish()

    leases = [event["shard"] for event in case.events("lease")]
    again = {shard for shard in leases if leases.count(shard) > 1}
    left = {e["worker"] for e in case.events("worker_leave") if e["reason"] not in PLANNED}
    assert [event["device"] for event in case.events("worker_join")] == ["cuda", "cpu", "cpu"]
    assert left == lost and len(again) <= len(lost) == 2
    assert all(leases.count(shard) == 2 for shard in again)
    report = audit(case.run)
    assert report["ok"] and report["produced_again"] == [], report
    measured(f"a node's workers were there after {to_join_s:.1f} s")
    measured(f"a lost node was noticed after {to_notice_s:.1f} s, {len(again)} shards made again")
    assert to_join_s < JOIN_S


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_of_teachers_is_lost_while_the_run_trains(chaos, nodes, measured):
    """kill -9 of a second machine: the trainer goes on with what the head's worker makes."""
    head = nodes(trainer=1, teacher=1)
    node = nodes(teacher=2)
    case = chaos(f"cluster.address={head.address}", "train.max_steps=480")
    case.env = nodes.env
    case.start()
    case.until(lambda: len(case.events("worker_join")) == 3)
    case.until_step(20)
    far = {event["worker"] for event in case.events("worker_join")}
    killed = time.time()
    node.kill()
    case.finish()
    case.check()
    lost = {e["worker"] for e in case.events("worker_leave") if e["reason"] not in PLANNED}
    assert len(lost) == 2 and lost < far
    measured(
        f"next shard after {case.next_event_s(killed, 'commit'):.1f} s, "
        f"next steps after {case.next_event_s(killed, 'steps'):.1f} s, "
        f"{case.check_waste(shards=2)}"
    )
