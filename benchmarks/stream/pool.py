"""The bookkeeping of `cluster.pool.pool` for many workers, with a stand-in for the functions of
Ray.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.pool import pool as pool_module
from cluster.pool.pool import TeacherPool
from cluster.pool.preflight import Introduction
from cluster.settings.hydra import compose
from cluster.state.done import view_of
from distill.data.sidecar import shard_spec
from distill.testing import write_tiny_record

SHARD_BYTES = 4_000_000
PERIOD_S = 10.0  # a shard of every worker
ROUND_S = 0.1  # the pool looks so often


class Task:
    """A call of a worker, done at a time of the wall clock."""

    def __init__(self, value: Any, seconds: float = 0.0) -> None:
        self.value, self.at = value, time.monotonic() + seconds


class Method:
    """`actor.name.remote(*arguments)`."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class Worker:
    """An actor that takes PERIOD_S for a shard and no computer."""

    count = 0

    def __init__(self, fingerprints: dict[str, str]) -> None:
        name, Worker.count = f"host:{Worker.count}", Worker.count + 1
        self.shards = 0
        result = {"bytes": SHARD_BYTES, "seconds": PERIOD_S}
        found = Introduction(name, f"node{Worker.count // 8}", f"{Worker.count % 8}", "gpu", "born")
        loaded = {"worker": name, "fingerprints": fingerprints, "trials": {}}
        self.introduce = Method(lambda _: Task(found))
        self.load = Method(lambda: Task(dict(loaded), 1.0))
        self.drop = Method(lambda shard: Task(None))
        self.produce = Method(lambda shard: Task(result, PERIOD_S))
        self.progress = Method(lambda: Task((name, time.monotonic())))


class StandIn:
    """What the pool uses of Ray, without the messages."""

    def __init__(self, fingerprints: dict[str, str]) -> None:
        self._fingerprints = fingerprints

    def remote(self, *_: Any) -> Any:
        """An actor class, or an actor."""
        return self if isinstance(_[0], type) else Worker(self._fingerprints)

    def options(self, **_: Any) -> StandIn:
        """The actor class."""
        return self

    def wait(self, tasks: list[Task], num_returns: int = 1, timeout: float = 0) -> Any:
        """The tasks that are done, and the others; waits for the first."""
        now = time.monotonic()
        if timeout > 0:
            time.sleep(max(0.0, min(timeout, min(task.at for task in tasks) - now)))
        return [t for t in tasks if t.at <= now], [t for t in tasks if t.at > now]

    def get(self, task: Task) -> Any:
        """The task's value."""
        return task.value

    def kill(self, actor: Worker) -> None:
        """Nothing."""


def pool_share(num_workers: int, seconds: float, folder: Path) -> dict[str, float]:
    """CPU time over wall time of a whole `TeacherPool`, its log of events included."""
    (config,) = compose(
        [
            "experiment=digits",
            f"run.dir={folder}",
            "data.num_classes=0",
            "~teacher",
            "+teacher={only: {kind: analytic, path: ring8}}",
            f"cluster.teachers.num_workers={num_workers}",
            "train.max_steps=20000000",
            "trajectory.max_bytes=1000000000000000",
        ]
    )
    prints = {"only": 64 * "f"}
    spec = shard_spec(config.seed, config.data.image, config.trajectory, config.teacher, prints)
    write_tiny_record(config.files, {})
    real, pool_module.ray = pool_module.ray, StandIn(prints)
    listing, pool_module.committed = pool_module.committed, lambda run: {}
    try:
        pool = TeacherPool(view_of(config), spec, trainer_reads=False)
        known = pool.coordinator.committed  # what the pool finds is what it knows
        pool_module.committed = lambda run: dict(known)
        while len(pool.coordinator.workers) < num_workers:
            pool.poll()
        made, used, began = len(known), time.process_time(), time.monotonic()
        while time.monotonic() < began + seconds:
            pool.poll()
            pool.rest(ROUND_S)
        used, wall = time.process_time() - used, time.monotonic() - began
        made = len(known) - made
    finally:
        pool_module.ray, pool_module.committed = real, listing
    return {"share": used / wall, "commits_per_s": made / wall}
