"""metrics.jsonl: loss terms and speed by step, a line now and then. Standard library only."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.run import files, records
from distill.run.dir import RunDir

TAIL_BYTES = 8192  # more than the longest line


@dataclass(frozen=True)
class Metrics(records.Stamped):
    """A line of metrics.jsonl: means over the steps since the line before, over all ranks, unless
    they say otherwise. What was not always noted is None in the lines of older runs.
    """

    step: int  # steps done
    loss: float | None = None  # the weighted total
    terms: dict[str, float] = field(default_factory=dict)  # each before its weight
    lr: float | None = None  # of the last step
    grad_norm: float | None = None  # of the last step, global, before clipping
    samples_per_s: float | None = None  # waiting included
    step_s: float | None = None  # seconds a step, saves left out
    phases_s: dict[str, float] = field(default_factory=dict)  # seconds a step of rank 0, by phase
    data_wait_fraction: float | None = None  # share of the time that rank 0 waited for data
    flops_per_s: float | None = None  # FLOP/s of all ranks by formula
    mfu: float | None = None  # that over what the devices can do; None where unknown
    peak_memory_bytes: int | None = None  # of the rank with the most
    world_size: int = 1  # ranks
    more: dict[str, Any] = field(
        default_factory=dict, metadata=records.REST
    )  # of callbacks, by key


def metrics_of(step: int, values: dict[str, Any]) -> Metrics:
    """The line of now, after `step` steps, from its values by key."""
    return records.record_of(Metrics, {"time": records.now(), "step": step, **values})


def append_metrics(run: RunDir, line: Metrics) -> None:
    """Writes a line."""
    files.append_lines(run.metrics, [records.tree_of(line)])


def read_metrics(run: RunDir) -> Iterator[Metrics]:
    """The lines in their order; what is none is left out."""
    for tree in files.read_lines(run.metrics):
        try:
            yield records.record_of(Metrics, tree)
        except records.RecordError:
            continue


def last_step(metrics: Path) -> int:
    """Steps done according to the last whole line of metrics.jsonl; 0 when there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
