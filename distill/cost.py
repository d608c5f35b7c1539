"""What a run has cost so far, from its files. Standard library only."""

from __future__ import annotations

import json
from typing import Any

from distill.rundir import RunDir, read_lines


def read_cost(run: RunDir) -> dict[str, float | int]:
    """The cost ledger of results.json.

    teacher_device_s: seconds workers spent on the committed shards, one device each.
    train_device_s: wall seconds of training times ranks, waiting for data included. Steps that a
    restart repeated
        count again, as they were paid for again.
    teacher_nfe: velocity evaluations of all teachers over all samples (guidance doubles the work
    of one, not the count). bytes: size of the committed shards.
    """
    sidecars = [json.loads(path.read_text()) for path in sorted(run.shards.glob("*.json"))]
    return {
        "teacher_device_s": round(sum(sidecar["seconds"] for sidecar in sidecars), 1),
        "train_device_s": round(train_device_s(run), 1),
        "teacher_nfe": sum(sidecar["nfe"] for sidecar in sidecars),
        "bytes": sum(sidecar["bytes"] for sidecar in sidecars),
    }


def train_device_s(run: RunDir) -> float:
    """Seconds times ranks of all logged training steps, repeated ones included."""
    records: list[dict[str, Any]] = [r for r in read_lines(run.events) if r.get("kind") == "resume"]
    records += [r for r in read_lines(run.metrics) if "step_s" in r]
    records.sort(
        key=lambda record: record["time"]
    )  # stable: a resume comes before the metrics of its second
    total, position = 0.0, 0
    for record in records:
        if "step_s" in record:
            steps = max(0, record["step"] - position)
            total += steps * record["step_s"] * record.get("world_size", 1)
        position = record["step"]
    return total
