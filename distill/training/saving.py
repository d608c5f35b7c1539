"""Callbacks that write the state of a training: its checkpoints, and models made from them."""

from collections.abc import Callable, Sequence
from typing import Any

from distill.checkpoint import agree, manifest
from distill.checkpoint.saver import Saver
from distill.config import ConfigError, ImageSpec, TrainConfig
from distill.engine.engine import Engine
from distill.export.student import export_checkpoint
from distill.networks.config import NetworkConfig
from distill.networks.files import DESCRIPTION
from distill.run import events, files
from distill.training.callbacks import Callback


class Checkpointer(Callback):
    """Saves every `train.save_every` steps, at the last one, and whenever the loop asks for it."""

    def __init__(
        self,
        engine: Engine,
        run: files.RunDir,
        config: TrainConfig,
        origin: dict[str, Any],
        say: Callable[[events.Save], None],
    ) -> None:
        """`origin` is what manifests say of the run; `say` takes the event of every checkpoint."""
        self._config = config
        self._saver = Saver(run.checkpoints, engine, config, origin, say)

    def wants_save(self, done: int) -> bool:
        return done % self._config.save_every == 0 or done == self._config.max_steps

    def save(self, done: int) -> None:
        self._saver.save(done)

    @property
    def has_failed(self) -> bool:
        return self._saver.has_failed

    def wait(self) -> None:
        self._saver.wait()

    def close(self) -> None:
        self._saver.close()


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
