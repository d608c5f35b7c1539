"""What a run has cost so far, from its files. No torch."""

from __future__ import annotations

import json
from typing import Any

from distill.data.stores.store import open_store
from distill.run.dir import RunDir
from distill.run.files import read_lines


def read_cost(run: RunDir) -> dict[str, float | int]:
    """The cost ledger of results.json.

    teacher_device_s: seconds workers spent on the committed shards, one device each.
    train_device_s: wall seconds of training times ranks, waiting for data included. Steps that a
    restart repeated
        count again, as they were paid for again.
    teacher_nfe: velocity evaluations of all teachers over all samples (guidance doubles the work
    of one, not the count). bytes: size of the committed shards.
    """
    sidecars = [json.loads(content) for content in open_store(run).sidecars()]
    return {
        "teacher_device_s": round(sum(sidecar["seconds"] for sidecar in sidecars), 1),
        "train_device_s": round(train_device_s(run), 1),
        "teacher_nfe": sum(sidecar["nfe"] for sidecar in sidecars),
        "bytes": sum(sidecar["bytes"] for sidecar in sidecars),
    }


def train_device_s(run: RunDir) -> float:
    """Seconds times ranks of all logged training steps, repeated ones included."""
    total, position = 0.0, 0
    for record in _starts_and_steps(run):
        if "step_s" in record:
            steps = max(0, record["step"] - position)
            total += steps * record["step_s"] * record.get("world_size", 1)
        position = record["step"]
    return total


def phase_seconds(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of a step in each phase, over logged steps in the order of time."""
    total: dict[str, float] = {}
    position = steps = 0
    for record in metrics:
        if "phases_s" in record:
            count = max(0, record["step"] - position)
            steps += count
            for name, seconds in record["phases_s"].items():
                total[name] = total.get(name, 0.0) + count * seconds
        position = record["step"]
    return {name: seconds / steps for name, seconds in total.items()} if steps else {}


def goodput(run: RunDir, now: float | None = None) -> float | None:
    """Useful step time over the wall time of training, in [0, 1]; None before the first metrics.

    Useful is the time of the steps that the weights come from, each once, without waiting for data.
    Wall time runs from the first start to the last logged step, or to `now` (Unix time): starts,
    saves, waits, steps done again, and any pause between two starts are all in it.
    """
    useful: list[tuple[int, float]] = []  # (last step, seconds) of each line of metrics that counts
    first = last = None
    position = 0
    for record in _starts_and_steps(run):
        first = record["time"] if first is None else first
        if "step_s" in record:
            seconds = max(0, record["step"] - position) * record["step_s"]
            useful.append((record["step"], seconds * (1 - record.get("data_wait_fraction", 0.0))))
            last = record["time"]
        else:
            useful = [line for line in useful if line[0] <= record["step"]]
        position = record["step"]
    if first is None or last is None:
        return None
    wall = max(last, now or last) - first
    return min(1.0, sum(seconds for _, seconds in useful) / wall) if wall > 0 else None


def _starts_and_steps(run: RunDir) -> list[dict[str, Any]]:
    """Starts of the trainer, and logged steps, in the order of time."""
    records: list[dict[str, Any]] = [r for r in read_lines(run.events) if r.get("kind") == "resume"]
    records += [r for r in read_lines(run.metrics) if "step_s" in r]
    # The sort is stable: a resume comes before the metrics of its second.
    return sorted(records, key=lambda record: record["time"])
