"""The pool's part of events.jsonl, written once a round: a round of many commits waits for the disk
once. No torch, no ray.

What a kill takes with it is the log of one round. The shards themselves are the truth.
"""

from __future__ import annotations

import time
from typing import Any

from distill.run.dir import RunDir, append_lines


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
