"""The teacher workers of a run over time, and what they made, as events.jsonl tells. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.run.dir import RunDir
from distill.run.files import append_lines


@dataclass(frozen=True)
class WorkerHistory:
    """What the pool did; times are Unix times in seconds.

    Attributes:
        changes: (time, workers wanted, workers at work), each until the next one.
        spans: (lease, commit) of every shard that was made.
    """

    changes: list[tuple[float, int, int]]
    spans: list[tuple[float, float]]

    def shards_made(self, times: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """Shards made until `times`. A shard counts evenly from its lease to its commit."""
        times = np.asarray(times, dtype=np.float64)
        if not self.spans:
            return np.zeros_like(times)
        began, ended = np.array(self.spans).T
        slope = 1 / (ended - began)
        at = np.concatenate([began, ended])
        order = np.argsort(at, kind="stable")
        at, slopes = at[order], np.concatenate([slope, -slope])[order].cumsum()
        made = np.concatenate([[0.0], (slopes[:-1] * np.diff(at)).cumsum()])
        return np.interp(times, at, made)


def worker_history(events: Iterable[dict[str, Any]]) -> WorkerHistory:
    """The history of all pools of a run, one after the other."""
    changes: list[tuple[float, int, int]] = []
    spans: list[tuple[float, float]] = []
    leases: dict[tuple[int, str], float] = {}
    joined: set[str] = set()
    wanted, last = 0, 0.0
    for event in events:
        time, before = event["time"], (wanted, len(joined))
        match event.get("kind"):
            case "pool" | "scale" as kind:
                if kind == "pool" and joined:  # the last supervisor was killed, and could not say
                    changes.append((last, wanted, 0))
                    joined.clear()
                wanted = event["workers"]
            case "worker_join":
                joined.add(event["worker"])
            case "worker_leave":
                joined.discard(event["worker"])
            case "lease":
                leases[event["shard"], event["worker"]] = time
            case "commit":
                began = leases.pop((event["shard"], event["worker"]), time - event["seconds"])
                spans.append((min(began, time - 1e-3), time))  # the log has milliseconds
        if (wanted, len(joined)) != before:
            changes.append((time, wanted, len(joined)))
        last = time
    return WorkerHistory(changes, spans)


class EventLog:
    """Events of one process, in order."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._records: list[dict[str, Any]] = []

    def add(self, kind: str, **values: Any) -> None:
        """Takes an event with the time of now."""
        self._records.append({"time": round(time.time(), 3), "kind": kind, **values})

    def flush(self) -> None:
        """Writes what was taken."""
        if self._records:
            append_lines(self._run.events, self._records)
            self._records.clear()
