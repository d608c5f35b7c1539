"""How many teacher workers a live run has, and how another shell changes that. No torch, no ray.

    target.json   {"workers": 3}, written by `bowstring scale RUN 3`; the pool looks every second

A pool that starts takes `cluster.teachers.num_workers` and removes what an earlier one left. On a
cluster it follows the nodes that come and go: as many workers as fit, at least `num_workers`, at
most `max_workers` or what `scale` asks for. Where workers ask for GPUs, a node without one takes
workers that compute on CPU.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.plan.placement import Device, _fitting
from cluster.settings.schema import ClusterConfig
from distill.config import ConfigError, check
from distill.run import events, files, records

# -----------------------------------------------------------------------------------------------
# The wish


@dataclass(frozen=True)
class Target:
    """target.json."""

    workers: int


def write_target(run: files.RunDir, workers: int) -> None:
    """Asks the pool of a live run for `workers` workers.

    Raises:
        ConfigError: the pool cannot have that many.
    """
    pool = events.read_history(run)
    check(
        pool.target is not None, f"{run.root} has no teacher workers yet; it makes no shards so far"
    )
    check(workers >= 0, f"{workers} teacher workers cannot be; 0 pauses the production")
    if pool.most is not None:
        check(
            workers <= pool.most,
            f"{workers} teacher workers are more than the {pool.most} that this run's machine "
            "takes; a cluster (cluster.address) has no such limit",
        )
    files.write_json(run.target, records.tree_of(Target(workers)))


def read_target(run: files.RunDir) -> int | None:
    """The number asked for; None when nobody has asked since the pool started.

    Raises:
        ConfigError: the file is not as `bowstring scale` writes it.
    """
    try:
        found = files.patiently(
            lambda: records.parse_record(Target, run.target.read_bytes()), records.RecordError
        )
    except FileNotFoundError:
        return None
    except records.RecordError as error:
        raise ConfigError(
            f"{run.target} {error}; write it again with `bowstring scale RUN N`"
        ) from error
    return found.workers


# -----------------------------------------------------------------------------------------------
# What fits


def wanted_workers(
    cluster: ClusterConfig,
    run: files.RunDir,
    nodes: list[dict[str, Any]],
    lost: Mapping[Device, int] | None = None,
) -> dict[Device, int]:
    """Teacher workers that there shall be now, by device; `nodes` is what Ray says of those of a
    cluster, `lost` how many of their places take no work. GPUs are filled first. Workers for which
    there is no place yet wait for the first kind.
    """
    pool, asked = cluster.teachers, read_target(run)
    first: Device = "cuda" if pool.gpus_per_worker > 0 else "cpu"
    wanted: dict[Device, int] = {"cuda": 0, "cpu": 0}
    if not cluster.address:
        wanted[first] = pool.num_workers if asked is None else asked
        return wanted
    fit = dict(wanted)
    for node in nodes:
        if node["Alive"]:
            device = first if node["Resources"].get("GPU") else "cpu"
            fit[device] += _fitting(cluster, node["Resources"], device)
    for device, places in (lost or {}).items():
        fit[device] = max(0, fit[device] - places)
    most = (pool.max_workers or math.inf) if asked is None else asked
    left = int(min(most, max(pool.num_workers, sum(fit.values()))))
    for device in wanted:
        wanted[device] = min(fit[device], left)
        left -= wanted[device]
    wanted[first] += left
    return wanted


# -----------------------------------------------------------------------------------------------
# What is sick

EXCLUDED_S = 86_400.0  # after a day a node may be mended; should it not be, one failure tells


def sick_nodes(run: files.RunDir) -> dict[str, str]:
    """Nodes that failed in this run within the last day, by the name that Slurm has for them, each
    with its last error: what `--exclude` of the next job may name.
    """
    since = time.time() - EXCLUDED_S
    excluded = events.read_history(run).excluded.values()
    return {e.node: e.reason for e in excluded if not e.gpu and e.time >= since}


def write_sick(run: files.RunDir) -> None:
    """Says to the batch scripts of a run on Slurm, one name a line, where it makes no more shards:
    a job that is queued again is not to start there.
    """
    if run.slurm.is_dir():
        files.write_atomic(run.slurm / "sick", "".join(f"{n}\n" for n in sick_nodes(run)).encode())
