"""Callbacks that write the state of a training: its checkpoints, and models made from them."""

import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from distill.checkpoint import agree, commit, manifest
from distill.config import ConfigError, ImageSpec, TrainConfig
from distill.engine.engine import Engine, Peers
from distill.export.student import export_checkpoint
from distill.networks.config import NetworkConfig
from distill.networks.files import DESCRIPTION
from distill.run import events, files
from distill.training.callbacks import Callback


class Checkpointer(Callback):
    """Saves every `train.save_every` steps, at the last one, and whenever the loop asks for it.

    Training waits for the whole save, or with `train.save_async` for the copy of the state to host
    memory. The rest is then done by a thread of every rank: the same files, the same order, the
    same promises (`distill.checkpoint.commit`). There is one save at a time. The next one waits for
    it, and so does the end of training, good or bad.
    """

    def __init__(
        self,
        checkpoints: Path,
        engine: Engine,
        config: TrainConfig,
        origin: dict[str, Any],
        say: Callable[[events.Save], None],
    ) -> None:
        """`origin` is what manifests say of the run; `say` takes the event of every checkpoint that
        is there.
        """
        self._checkpoints, self._engine, self._config = checkpoints, engine, config
        self._origin, self._say = origin, say
        self._thread = futures.ThreadPoolExecutor(1, "save")
        self._pending: futures.Future[None] | None = None

    def wants_save(self, done: int) -> bool:
        return done % self._config.save_every == 0 or done == self._config.max_steps

    def save(self, done: int) -> None:
        """Saves the state after `done` steps.

        Raises:
            SaveError: that failed, or the save before it did, on every rank.
        """
        started = time.monotonic()
        self.wait()
        snapshot = commit.take_snapshot(done, self._engine, self._origin)
        if self._config.save_async:
            stall_s, ranks = time.monotonic() - started, self._engine.background
            self._pending = self._thread.submit(self._commit, snapshot, ranks, started, stall_s)
        else:
            self._commit(snapshot, self._engine, started)

    def _commit(
        self, snapshot: commit.Snapshot, ranks: Peers, started: float, stall_s: float | None = None
    ) -> None:
        keep_last, keep_every = self._config.keep_last, self._config.keep_every
        size = commit.commit(self._checkpoints, snapshot, ranks, keep_last, keep_every)
        seconds = time.monotonic() - started
        stalled = seconds if stall_s is None else stall_s
        failure = ""
        try:
            there = manifest.all_steps(self._checkpoints)
            stats = (size, round(seconds, 4), round(stalled, 4))
            self._say(events.Save(snapshot.step, *stats, checkpoints=tuple(there)))
        except OSError as error:  # rank 0 alone writes events, and the others must not go on
            failure = f"step {snapshot.step} is saved, and no event could say so: {error}"
        agree.raise_together(ranks, failure, manifest.SaveError)

    @property
    def has_failed(self) -> bool:
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Raises SaveError when the last save failed, on every rank."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread once the last save is done, well or not."""
        self._thread.shutdown()


class Exporter(Callback):
    """Writes a teacher as it is after some steps, each from the checkpoint of that step.

    A start writes the model that a kill between save and export has left out.
    """

    def __init__(
        self,
        engine: Engine,
        run: files.RunDir,
        steps: Sequence[int],
        network: NetworkConfig,
        image: ImageSpec,
        about: dict[str, Any],
        wait: Callable[[], None],
    ) -> None:
        """`about` enters the description of every model; `wait` returns once what was saved is
        committed.
        """
        self._engine, self._run, self._steps = engine, run, steps
        self._network, self._image, self._about, self._wait = network, image, about, wait

    def begin(self, done: int) -> None:
        """Writes the model of this step, if it is one to export.

        Raises:
            ConfigError: on every rank: the model of an earlier step is gone.
        """
        failure = ""
        if self._engine.rank == 0:
            for step in self._steps:
                if step < done and not self._is_there(step):
                    failure = (
                        f"{self._run.model(step)} is missing, and the checkpoint of step {step} it "
                        f"was made from is no longer kept; put it back, or move {self._run.root} "
                        "away to train the teacher again"
                    )
        agree.raise_together(self._engine, failure, ConfigError)
        self.saved(done)

    def wants_save(self, done: int) -> bool:
        return done in self._steps

    def saved(self, done: int) -> None:
        """Writes the model of this step, if it is one to export, unless it is there.

        Raises:
            SaveError: on every rank: it could not be written.
        """
        if done not in self._steps:
            return
        self._wait()
        failure = ""
        if self._engine.rank == 0 and not self._is_there(done):
            checkpoint = self._run.checkpoints / manifest.step_name(done)
            out, about = self._run.model(done), {"kind": "teacher", "step": done, **self._about}
            try:
                export_checkpoint(checkpoint, out, self._network, self._image, about)
            except OSError as error:
                failure = f"{out} could not be written: {error}"
        agree.raise_together(self._engine, failure, manifest.SaveError)

    def _is_there(self, step: int) -> bool:
        return (self._run.model(step) / DESCRIPTION).is_file()
