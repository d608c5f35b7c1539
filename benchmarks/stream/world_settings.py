"""Settings of the simulated cluster in `benchmarks.stream.world`.

A node that is taken has `per_node` workers, and comes back as new workers. It goes in one of three
ways:

    drained   notice: its workers take no other shard, and have `notice_s` to finish theirs
    killed    no notice: Ray gives the node up `detect_s` later, and its leases go back
    silent    no notice, and nobody says so: each lease runs out

GPUs may be sick, each on another node, in one of these ways, for ever:

    load      its teachers do not load
    first     every shard fails at its first evaluation
    nan       every shard fails at its end: values that are not finite
    dies      its worker dies in the middle of every shard
    hangs     no evaluation comes to an end, until the lease runs out
    slow      every shard takes ten times as long
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.settings.schema import TeacherPoolConfig

WAYS = ("drained", "killed", "silent")
SICKNESSES = ("load", "first", "nan", "dies", "hangs", "slow")


@dataclass(frozen=True)
class Settings:
    """One world. Times in seconds.

    Attributes:
        headroom: shards that all teachers make in the time in which the trainer reads one.
        spread: sigma of the log-normal time of a shard, whose mean is `shard_s`; 0: all alike.
        per_hour: chance of a node to be taken, per hour it is up.
        rejoin_s, rejoin_spread: median and sigma of the log-normal time until a node is back with
            its teachers loaded.
        slow_gpus, slower: the first GPUs of every node take so many times `shard_s`.
        sick: the sicknesses there are, and each_sick how many GPUs have each.
        restart_s: until a worker that failed is replaced, its teachers loaded.
        shards: of the whole run.
        first, last: shards between which the trainer is measured: the start, when nothing lies
            ahead, and the end, when nothing is left to make, are not those of a long run.
        block_spread: blocks over which the passes of one are spread.
        samples_per_shard: only for the count of ids; the coordinator sees whole shards.
    """

    seed: int = 0
    teachers: int = 1000
    per_node: int = 8
    headroom: float = 1.0
    shard_s: float = 150.0
    spread: float = 0.5
    per_hour: float = 0.0
    way: str = "drained"
    notice_s: float = 120.0
    detect_s: float = 14.0
    rejoin_s: float = 600.0
    rejoin_spread: float = 1.0
    slow_gpus: int = 0
    slower: float = 2.0
    sick: tuple[str, ...] = ()
    each_sick: int = 3
    restart_s: float = 60.0
    lease_timeout_s: float = TeacherPoolConfig.lease_timeout_s
    max_attempts: int = TeacherPoolConfig.max_attempts
    ready_ahead: int = 8000
    block_shards: int = 16
    shards: int = 72_000
    first: int = 8_000
    last: int = 56_000
    samples_per_shard: int = 8
    passes: int = 4
    block_spread: int = 1
    batch_size: int = 64

    @property
    def step_s(self) -> float:
        """Seconds of a step that does not wait: B / (samples a second, times passes, needed)."""
        shards_per_s = self.teachers / self.shard_s / self.headroom
        return self.batch_size / (shards_per_s * self.samples_per_shard * self.passes)
