"""Where the trainer reads: `cursor.json`, by which the coordinator holds the teachers back.

    {"block": the block being read, "waiting_for": "" or why no batch came yet}

Needs no torch. Losing the file costs nothing but time: shards that exist are not made again.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Generic, Protocol, TypeVar

from distill.data.order import Order
from distill.run.dir import RunDir
from distill.run.files import write_json

PERIOD_S = 1.0  # a change of the waiting reason is written this often at most

Batch = TypeVar("Batch", covariant=True)


class Stream(Protocol[Batch]):
    """The part of `distill.data.stream.TrajectoryStream` that is used here."""

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting so far."""

    @property
    def waiting_for(self) -> str:
        """Why no batch came yet, or ""."""

    def read(self, step: int) -> Batch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""


class WithCursor(Generic[Batch]):
    """A stream whose position rank 0 writes down.

    A thread of its own writes, so that the reason of a wait is seen while the loop waits.
    """

    def __init__(self, stream: Stream[Batch], order: Order, run: RunDir, rank: int) -> None:
        self._stream, self._order, self._run = stream, order, run
        self._step: int | None = None  # until the first read, what an earlier training wrote stands
        self._moved = threading.Event()
        if rank == 0:
            threading.Thread(target=self._write_changes, daemon=True).start()

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._stream.wait_s

    def read(self, step: int) -> Batch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""
        before, self._step = self._step, step
        if before is None or self._order.block_of(step) != self._order.block_of(before):
            self._moved.set()
        return self._stream.read(step)

    def _write_changes(self) -> None:
        written = None
        while True:
            self._moved.wait(PERIOD_S)
            self._moved.clear()
            if self._step is None:
                continue
            cursor = (self._order.block_of(self._step), self._stream.waiting_for)
            if cursor != written:
                # A full disk or a file server that is away: tried again after the next wait.
                with contextlib.suppress(OSError):
                    write_json(self._run.cursor, {"block": cursor[0], "waiting_for": cursor[1]})
                    written = cursor


def read_cursor(run: RunDir) -> tuple[int, str]:
    """The block being read, and what the trainer waits for; (0, "") before it has started."""
    try:
        cursor = json.loads(run.cursor.read_text())
        return int(cursor["block"]), str(cursor["waiting_for"])
    except (FileNotFoundError, ValueError, KeyError):
        return 0, ""
