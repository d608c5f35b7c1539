"""What bounds the teacher pool, which workers it refuses, and what it leaves of a shard that cannot
be made. No ray.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from cluster.plan.placement import Device, gpus_of_worker
from cluster.plan.stream import StreamPlan
from cluster.pool.coordinator import Limits
from cluster.settings.schema import RunConfig, TeacherPoolConfig
from distill.config import check
from distill.data.sidecar import ShardSpec
from distill.run.dir import RunDir
from distill.run.files import write_json


def production_limits(config: RunConfig, plan: StreamPlan, trainer_reads: bool) -> Limits:
    """The coordinator's limits. Without a trainer that reads, all shards are made at once."""
    pool, trajectory = config.cluster.teachers, config.trajectory
    return Limits(
        num_shards=plan.shards,
        block_shards=trajectory.block_shards,
        ready_ahead=trajectory.ready_ahead if trainer_reads else plan.shards,
        max_bytes=trajectory.max_bytes,
        shard_bytes=plan.shard_bytes,
        lease_timeout_s=pool.lease_timeout_s,
        max_attempts=pool.max_attempts,
    )


def actor_options(pool: TeacherPoolConfig, device: Device) -> dict[str, Any]:
    """Options of a worker's Ray actor. Nobody but the pool starts one again.

    Ray puts an actor that asks for no GPU on a node without one, as long as there is room.
    """
    return {
        "num_cpus": pool.cpus_per_worker,
        "num_gpus": gpus_of_worker(pool, device),
        "resources": {"teacher": 1.0},
        "max_concurrency": 2,
        "max_restarts": 0,
    }


def check_fingerprints(spec: ShardSpec, worker: str, fingerprints: dict[str, Any]) -> None:
    """Raises ConfigError unless a worker holds the teachers of the run, weight for weight."""
    for teacher in spec.teachers:
        theirs = fingerprints[teacher.name]
        check(
            theirs == teacher.fingerprint,
            f"worker {worker} has other weights for teacher.{teacher.name} ({theirs[:12]}) than "
            f"the run ({teacher.fingerprint[:12]}); give every node the same file",
        )


def set_request_aside(run: RunDir, shard: int, reason: str, traceback: str) -> str:
    """What to tell the user of a shard that cannot be made; `quarantine/` gets a file with it."""
    path = run.quarantine / f"{shard:08d}-{uuid.uuid4().hex[:8]}" / f"{shard:08d}.reason.json"
    record = {"shard": shard, "reason": f"could not be made: {reason}", "traceback": traceback}
    write_json(path, {**record, "time": round(time.time(), 3)})
    return (
        f"shard {shard} was given up after {reason}; see {path}. Mend the cause and give the same "
        f"command again. The last:\n{traceback}"
    )
