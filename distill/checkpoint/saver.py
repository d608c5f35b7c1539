"""When a checkpoint is written: while training waits, or in the background (`train.save_async`).

In the background, training stands still for the copy of the state to host memory. The rest is done
by a thread of every rank: the same files, the same order, the same promises
(`distill.checkpoint.commit`). There is one save at a time. The next one waits for it, and so does
the end of training, good or bad.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.checkpoint import agree, manifest
from distill.checkpoint.commit import Snapshot, commit, take_snapshot
from distill.config import TrainConfig
from distill.engine.engine import Engine, Peers
from distill.run.events import Save


class Saver:
    """Saves the state of an engine. All calls are collective."""

    def __init__(
        self,
        checkpoints: Path,
        engine: Engine,
        config: TrainConfig,
        origin: dict[str, Any],
        committed: Callable[[Save], None],
    ) -> None:
        """`committed` takes the event of every checkpoint that is there."""
        self._checkpoints, self._engine, self._config = checkpoints, engine, config
        self._origin, self._committed = origin, committed
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is None:
            self.wait()

    def close(self) -> None:
        """Ends the thread once the last save is done, well or not."""
        self._thread.shutdown()

    @property
    def has_failed(self) -> bool:
        """Whether the save in the background has failed; `wait` says why."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Waits for the last save.

        Raises:
            SaveError: it failed, on every rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def save(self, step: int) -> None:
        """Saves the state after `step` steps.

        Raises:
            SaveError: that failed, or the save before it did, on every rank.
        """
        started = time.monotonic()
        self.wait()
        snapshot = take_snapshot(step, self._engine, self._origin)
        if self._config.save_async:
            stall_s, ranks = time.monotonic() - started, self._engine.background
            self._pending = self._thread.submit(self._commit, snapshot, ranks, started, stall_s)
        else:
            self._commit(snapshot, self._engine, started)

    def _commit(
        self, snapshot: Snapshot, ranks: Peers, started: float, stall_s: float | None = None
    ) -> None:
        keep_last, keep_every = self._config.keep_last, self._config.keep_every
        size = commit(self._checkpoints, snapshot, ranks, keep_last, keep_every)
        seconds = time.monotonic() - started
        stalled = seconds if stall_s is None else stall_s
        failure = ""
        try:
            self._committed(Save(snapshot.step, size, round(seconds, 4), round(stalled, 4)))
        except OSError as error:  # rank 0 alone writes events, and the others must not go on
            failure = f"step {snapshot.step} is saved, and no event could say so: {error}"
        agree.raise_together(ranks, failure, manifest.SaveError)
