"""How many ranks the trainer has: as many as its nodes take now. No torch, no ray.

    cluster.trainer.num_workers: 4         four ranks, or none
    cluster.trainer.num_workers: [2, 8]    the most that fit, from 2 to 8, and that share the batch

The sequence of samples is the same for any number, so a group may be started again with another one
(`cluster.group`).
"""

from __future__ import annotations

import math
import socket
from typing import Any

from cluster.config import ClusterConfig
from distill.config import TrainConfig

ANSWER_S = 2.0  # a raylet that lives accepts a connection at once


def group_size(cluster: ClusterConfig, train: TrainConfig, nodes: list[dict[str, Any]]) -> int:
    """Ranks of a group on the nodes that there are now; 0 when they have room for too few.

    `nodes` is what Ray says of them. All that a node has counts: on a cluster teachers leave room
    for ranks (`cluster.scale`), and on this machine alone ranks leave room for teachers.
    """
    fit = sum(_fitting(cluster, node["Resources"]) for node in nodes if node["Alive"])
    return max((size for size in cluster.trainer.sizes(train) if size <= fit), default=0)


def _fitting(cluster: ClusterConfig, resources: dict[str, float]) -> int:
    trainer, teachers = cluster.trainer, cluster.teachers
    others = 0 if cluster.address else teachers.num_workers
    fit = int(resources.get("trainer", 0.0))
    for name, each, of_teacher in (
        ("CPU", trainer.cpus_per_worker, teachers.cpus_per_worker),
        ("GPU", trainer.gpus_per_worker, teachers.gpus_per_worker),
    ):
        if each > 0:
            free = resources.get(name, 0.0) - others * of_teacher
            fit = min(fit, math.floor(free / each + 1e-9))
    return max(0, fit)


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
