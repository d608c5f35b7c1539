"""What a rank reads: the stream of its stage, and what its reading says to others.

The watchdog is told that the rank goes on; the teachers are told, through `cursor.json`, which
block is read and what is waited for.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from cluster.plan.stream import stream_order
from cluster.state.cursor import write_cursor
from cluster.trainer.job import TrainJob
from distill.data.order import Order
from distill.data.stream import TrajectoryStream
from distill.datasets.images import ImageStream, open_images, workers
from distill.engine.engine import Peers
from distill.flow.trajectory import TrajectoryBatch
from distill.run.files import RunDir
from distill.teachers.config import weight_table

PERIOD_S = 1.0  # a change of the waiting reason is written this often at most


class Stream(Protocol):
    """One rank's view of a stream of batches."""

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data so far."""

    @property
    def waiting_for(self) -> str:
        """What `read` waits for at this moment; "" when it does not wait."""

    def read(self, step: int) -> TrajectoryBatch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""


class Source:
    """A rank's source of batches (`distill.training.loop.Source`)."""

    def __init__(
        self, stream: Stream, beat: Callable[[], None], cursor: "Cursor | None" = None
    ) -> None:
        """`beat` is called after every read; `cursor` follows."""
        self._stream, self._beat, self._cursor = stream, beat, cursor

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._stream.wait_s

    def read(self, step: int) -> TrajectoryBatch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""
        if self._cursor is not None:
            self._cursor.move(step)
        batch = self._stream.read(step)
        self._beat()
        return batch


class Cursor:
    """Keeps `cursor.json` where a stream is.

    A thread of its own writes, so that the reason of a wait is seen while the loop waits.
    """

    def __init__(self, stream: Stream, order: Order, run: RunDir) -> None:
        self._stream, self._order, self._run = stream, order, run
        self._block: int | None = None  # until it moves, what an earlier training wrote stands
        self._moved = threading.Event()
        threading.Thread(target=self._write_changes, daemon=True).start()

    def move(self, step: int) -> None:
        """The stream is about to read `step`."""
        block = self._order.newest_block(step)
        if block != self._block:
            self._block = block
            self._moved.set()

    def _write_changes(self) -> None:
        written = None
        while True:
            self._moved.wait(PERIOD_S)
            self._moved.clear()
            if self._block is None:
                continue
            cursor = (self._block, self._stream.waiting_for)
            if cursor != written:
                # A full disk or a file server that is away: tried again after the next wait.
                with suppress(OSError):
                    write_cursor(self._run, *cursor)
                    written = cursor


def build_source(
    job: TrainJob, ranks: Peers, should_stop: Callable[[], bool], beat: Callable[[], None]
) -> Source:
    """The source of this stage for this rank. `should_stop` ends a wait for data."""

    def should_stop_waiting() -> bool:
        beat()  # to wait for data is no hang, and the stream has a limit of its own
        return should_stop()

    config, rank, world_size = job.config, ranks.rank, ranks.world_size
    if job.stage == "pretrain":
        stream = ImageStream(
            open_images(config.data), config.seed, job.train.batch_size, rank, world_size,
            job.train.label_dropout, config.data.flips, workers(config.data),
        )  # fmt: skip
        return Source(stream, beat)
    assert job.spec is not None
    order = stream_order(config)
    weights = weight_table(config.teacher, config.data.num_classes)
    trajectories = TrajectoryStream(
        job.run, job.spec, config.trajectory, order, rank, world_size, weights, should_stop_waiting
    )
    cursor = Cursor(trajectories, order, job.run) if rank == 0 else None
    return Source(trajectories, beat, cursor)
