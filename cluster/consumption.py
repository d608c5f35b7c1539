"""What the trainer consumed, replayed from events.jsonl and compared with the plan. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from distill.data.order import Order
from distill.run.dir import RunDir
from distill.run.files import read_lines

HASH_STEPS = 4096  # steps whose ids are in memory at once


@dataclass
class Consumption:
    """Steps that stand, and what is wrong with how they came."""

    steps: int = 0
    problems: list[str] = field(default_factory=list)


def audit_consumption(run: RunDir, order: Order) -> Consumption:
    """Replays events.jsonl: windows of steps, and restarts that fell back."""
    found = Consumption()
    checked: dict[tuple[int, int], str] = {}
    for event in read_lines(run.events):
        if event.get("kind") == "resume":
            step = event["step"]
            if step > found.steps:
                found.problems.append(f"resumed at step {step} after only {found.steps} steps")
            found.steps = step
        elif event.get("kind") == "steps":
            first, last = event["first"], event["last"]
            if first != found.steps:
                found.problems.append(f"steps {first}-{last} came after {found.steps} steps")
            if (first, last) not in checked:
                checked[first, last] = planned_sha256(order, first, last + 1)
            if event["ids_sha256"] != checked[first, last]:
                found.problems.append(f"steps {first}-{last} read other samples than planned")
            found.steps = last + 1
    return found


def planned_sha256(order: Order, first: int, end: int) -> str:
    """Hexadecimal sha256 of the planned ids of steps first .. end - 1, little-endian int64."""
    digest = hashlib.sha256()
    for start in range(first, end, HASH_STEPS):
        stop = min(end, start + HASH_STEPS)
        ids, _ = order.entries_between(start * order.batch_size, stop * order.batch_size)
        digest.update(ids.astype("<i8").tobytes())
    return digest.hexdigest()
