"""The coordinator alone: leases per second, its share of a core, memory, and the way back to life.

No Ray and no teacher: simulated workers drive the real state machine of `cluster.pool.coordinator`,
and the real bookkeeping of `cluster.pool.pool` around it with a stand-in for Ray's six functions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.sections import markdown
from benchmarks.stream.pool import PERIOD_S, ROUND_S, SHARD_BYTES, pool_share
from cluster.pool.coordinator import Coordinator, Limits
from cluster.pool.messages import (
    Asked,
    Committed,
    CursorMoved,
    Event,
    Heartbeat,
    Joined,
    Leased,
    Released,
    Tick,
)
from cluster.state.evicted import read_evicted
from distill.data.layout import state_bytes, state_offset, tar_bytes
from distill.data.sidecar import ShardSpec, Sidecar, TeacherSpec
from distill.data.stores.store import committed
from distill.run.files import RunDir

LEASE_TIMEOUT_S = 120.0
BLOCK = 8


def limits(num_shards: int, room: int) -> Limits:
    """Of a run of many shards, `room` of which fit on disk and may be made ahead."""
    return Limits(num_shards, BLOCK, room, room * SHARD_BYTES, SHARD_BYTES, LEASE_TIMEOUT_S, 3)


# -----------------------------------------------------------------------------------------------
# Leases per second


def leases_per_s(num_workers: int, leases: int) -> float:
    """Commits taken and leases given by one core, with `num_workers` leases open all the time."""
    state = Coordinator(limits(leases + num_workers, leases + num_workers), {})
    given: deque[tuple[str, int]] = deque()

    def tell(event: Event, now: float) -> None:
        actions = state.handle(event, now)
        given.extend((a.worker, a.shard) for a in actions if isinstance(a, Leased))

    for index in range(num_workers):
        tell(Joined(f"w{index}"), 0.0)
        tell(Asked(f"w{index}"), 0.0)
    began = time.perf_counter()
    for index in range(leases):
        worker, shard = given.popleft()
        now = index * PERIOD_S / num_workers
        tell(Committed(shard, SHARD_BYTES), now)
        tell(Asked(worker), now)
    seconds = time.perf_counter() - began
    assert len(given) == num_workers and state.num_made == leases
    return leases / seconds


def share_of_core(num_workers: int, simulated_s: float) -> float:
    """CPU time over time, with a commit per worker and PERIOD_S, heartbeats, rounds and eviction.

    A trainer reads 2,000 shards behind the teachers, and the disk has room for 4,000.
    """
    state = Coordinator(limits(10_000_000, 4000), {})
    rate = num_workers / PERIOD_S
    given: deque[tuple[str, int]] = deque()
    names = [f"w{index}" for index in range(num_workers)]

    def tell(event: Event, now: float) -> None:
        actions = state.handle(event, now)
        given.extend((a.worker, a.shard) for a in actions if isinstance(a, Leased))

    for name in names:
        tell(Joined(name), 0.0)
        tell(Asked(name), 0.0)
    done = beats = held = 0
    began = time.process_time()
    for step in range(int(simulated_s / ROUND_S)):
        now = step * ROUND_S
        while done < now * rate:
            worker, shard = given.popleft()
            tell(Committed(shard, SHARD_BYTES), now)
            tell(Asked(worker), now)
            done += 1
        while beats < now * num_workers / (LEASE_TIMEOUT_S / 4):
            tell(Heartbeat(names[beats % num_workers]), now)
            beats += 1
        first = max(0, done - 2000) // BLOCK * BLOCK
        if state.needs_room:
            tell(Released(first), now)
        tell(CursorMoved(first), now)
        tell(Tick(), now)
        held += state.is_blocked  # the supervisor asks every round, for its bars
    seconds = time.process_time() - began
    assert len(given) + len(state.waiting) == num_workers and state.evicted
    return seconds / simulated_s


# -----------------------------------------------------------------------------------------------
# Memory, and the rebuild

MEMORY = """
import sys, psutil
from cluster.pool.coordinator import Coordinator, Limits
count, what = int(sys.argv[1]), sys.argv[2]
process = psutil.Process()
before = process.memory_info().rss
limits = Limits(count + 8, 8, count, 10**18, 1, 1.0, 3)
if what == "evicted":
    state = Coordinator(limits, {}, set(range(count)))
else:  # sizes are objects of their own, as from a listing
    state = Coordinator(limits, {n: 4_000_000 + n for n in range(count)})
print(process.memory_info().rss - before)
"""


def memory(count: int, what: str) -> int:
    """Bytes that the coordinator takes for `count` shards that are "on disk" or "evicted"."""
    command = [sys.executable, "-c", MEMORY, str(count), what]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(found.stdout)


def write_sidecars(run: RunDir, count: int) -> None:
    """Real sidecars, and tars of the right size that take no room. Every 1,000th is missing."""
    teacher = TeacherSpec("teacher", 64 * "0", "heun", 16, 1.0)
    spec = ShardSpec(0, (0.0, 0.5, 1.0), "float16", True, (1, 8, 8), 64, (teacher,))
    offsets = tuple(state_offset(spec, index) for index in range(64))
    size = tar_bytes(spec)
    one = Sidecar(
        0, spec, size, 64 * "0", (3,) * 64, offsets, state_bytes(spec), 1, 1, 1.0, "x:1", "", 64
    )
    run.shards.mkdir(parents=True)
    for shard in range(count):
        if shard % 1000 != 999:
            run.sidecar(shard).write_bytes(replace(one, shard=shard).to_bytes())
            with run.tar(shard).open("wb") as file:
                file.truncate(size)


def rebuild(count: int, folder: Path) -> dict[str, float]:
    """Seconds from a folder of shards to the first lease, and of the listing alone."""
    run = RunDir(folder)
    write_sidecars(run, count)
    began = time.perf_counter()
    found = committed(run)
    listed_s = time.perf_counter() - began
    state = Coordinator(limits(count, count), found, read_evicted(run, found))
    state.handle(Joined("w"), 0.0)
    (lease,) = state.handle(Asked("w"), 0.0)
    seconds = time.perf_counter() - began
    assert isinstance(lease, Leased) and lease.shard == 999 and len(found) == count - count // 1000
    cpu = time.thread_time()
    committed(run)
    return {
        "shards": count,
        "seconds": seconds,
        "listing_s": listed_s,
        "listing_cpu_s": time.thread_time() - cpu,
    }


# -----------------------------------------------------------------------------------------------
# The section


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """All of it."""
    leases = 20_000 if quick else 200_000
    million = 100_000 if quick else 1_000_000
    return {
        "leases": [
            {"workers": n, "leases_per_s": leases_per_s(n, leases)} for n in (1, 100, 1000, 10_000)
        ],
        "state_machine_share": share_of_core(1000, 60 if quick else 600),
        "pool_share": pool_share(1000, 12 if quick else 40, folder / "pool"),
        "bytes_per_shard": {what: memory(million, what) / million for what in ("disk", "evicted")},
        "rebuild": rebuild(5000 if quick else 100_000, folder / "rebuild"),
        "file_system": os.uname().sysname,
    }


def page(found: dict[str, Any]) -> str:
    """The section in Markdown."""
    rows = [["simulated workers", "leases per second"]] + [
        [f"{row['workers']:,}", f"{row['leases_per_s']:,.0f}"] for row in found["leases"]
    ]
    pool, again, size = found["pool_share"], found["rebuild"], found["bytes_per_shard"]
    text = (
        f"1,000 workers that commit a shard each per 10 s take {found['state_machine_share']:.2%} "
        "of a core in the state machine (heartbeats, ten rounds a second and eviction included; "
        f"bar: 5 %), and {pool['share']:.1%} in the whole pool with its log of events "
        f"({pool['commits_per_s']:.0f} commits a second), without Ray's own messages.\n\n"
        f"A million shards take {size['disk']:.0f} MB of memory on disk and {size['evicted']:.0f} "
        f"MB evicted. From a folder of {again['shards']:,} shards to the first lease: "
        f"{again['seconds']:.2f} s, of which the listing {again['listing_s']:.2f} s (bar: 30 s; "
        "the names were in the system's cache)."
    )
    return f"{markdown(rows)}\n\n{text}"
