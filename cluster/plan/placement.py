"""What fits on the nodes of a cluster: places, cores and GPUs. No torch, no ray.

    cluster.trainer.num_workers: 4         four ranks, or none
    cluster.trainer.num_workers: [2, 8]    the most that fit, from 2 to 8, and that share the batch

The sequence of samples is the same for any number of ranks, so a group may be started again with
another one (`cluster.supervisor.group`).
"""

import math
import os
import socket
from typing import Any, Literal

from cluster.settings.schema import ClusterConfig, TeacherPoolConfig, WorkersConfig
from distill.config import TrainConfig

ANSWER_S = 2.0  # a raylet that lives accepts a connection at once


def needs(workers: WorkersConfig, count: int = 1) -> dict[str, float]:
    """Cores and GPUs that `count` workers ask for."""
    return {"CPU": count * workers.cpus_per_worker, "GPU": count * workers.gpus_per_worker}


def fitting(
    resources: dict[str, float], place: str, each: dict[str, float], others: dict[str, float]
) -> int:
    """How many workers fit on a node that take a `place` and `each`, beside what `others` take.

    `resources` is all that the node has.
    """
    fit = int(resources.get(place, 0.0))
    for name, amount in each.items():
        if amount > 0:
            free = resources.get(name, 0.0) - others[name]
            fit = min(fit, math.floor(free / amount + 1e-9))
    return max(0, fit)


def group_size(cluster: ClusterConfig, train: TrainConfig, nodes: list[dict[str, Any]]) -> int:
    """Ranks of a group on the nodes that there are now; 0 when they have room for too few.

    `nodes` is what Ray says of them. All that a node has counts: on a cluster teachers leave room
    for ranks (`cluster.state.workers`), and on this machine alone ranks leave room for teachers.
    """
    teachers = needs(cluster.teachers, 0 if cluster.address else cluster.teachers.num_workers)
    rank, alive = needs(cluster.trainer), [node["Resources"] for node in nodes if node["Alive"]]
    fit = sum(fitting(resources, "trainer", rank, teachers) for resources in alive)
    return max((size for size in cluster.trainer.sizes(train) if size <= fit), default=0)


def silent_nodes(nodes: list[dict[str, Any]]) -> list[str]:
    """Nodes for ranks that Ray counts as alive and that do not answer, by address.

    Ray takes up to 15 s to see that a node is lost, and would place ranks there until then.
    """
    asked = [node for node in nodes if node["Alive"] and node["Resources"].get("trainer")]
    return [node["NodeManagerAddress"] for node in asked if not _answers(node)]


def _answers(node: dict[str, Any]) -> bool:
    address = (node["NodeManagerAddress"], node["NodeManagerPort"])
    try:
        with socket.create_connection(address, timeout=ANSWER_S):
            return True
    except OSError:
        return False


Device = Literal["cuda", "cpu"]
WORKERS_PER_CORE = 2  # on this machine alone `scale` goes up to this


def most_workers(cluster: ClusterConfig) -> int | None:
    """Teacher workers at most; None on a cluster, whose nodes may come and go."""
    if cluster.address:
        return None
    return max(cluster.teachers.num_workers, WORKERS_PER_CORE * (os.cpu_count() or 1))


def _fitting(cluster: ClusterConfig, resources: dict[str, float], device: Device) -> int:
    """Teacher workers that fit on a node next to the trainer ranks that it may have to take."""
    ranks = min(int(resources.get("trainer", 0.0)), cluster.trainer.max_workers)
    worker = needs(cluster.teachers) | {"GPU": gpus_of_worker(cluster.teachers, device)}
    return fitting(resources, "teacher", worker, needs(cluster.trainer, ranks))


def gpus_of_worker(pool: TeacherPoolConfig, device: Device) -> float:
    """What a worker that computes there asks of its node."""
    return pool.gpus_per_worker if device == "cuda" else 0.0
