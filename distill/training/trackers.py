"""Copies of metrics.jsonl for people's tools: TensorBoard's event files, and W&B.

The only importer of tensorboard and of wandb. A tracker is a callback that takes what is recorded.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch.utils.tensorboard import SummaryWriter

from distill.config import ConfigError, check
from distill.run import events, files
from distill.training.callbacks import Callback

FLUSH_S = 10  # a kill loses so much of TensorBoard's copy
FINISH_TIMEOUT_S = 60.0  # for what is still to be sent to W&B at the end


def scalars(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(tag, value) of every number of a line of metrics.jsonl but the step; nested ones as
    "terms/output".
    """
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, float(value)


class TensorBoard(Callback):
    """An event file of every start. A thread writes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def begin(self, done: int) -> None:
        # Hides what an earlier start wrote of the steps that are now done again.
        self._writer = SummaryWriter(str(self._folder), purge_step=done + 1, flush_secs=FLUSH_S)

    def record(self, done: int, metrics: dict[str, Any]) -> None:
        """Raises OSError if none can be written."""
        assert self._writer is not None
        for tag, value in scalars(metrics):
            self._writer.add_scalar(tag, value, done)

    def close(self) -> None:
        """Writes what is left. A full disk is said by the logs that this is a copy of."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def check_wandb(project: str) -> None:
    """Raises ConfigError when a project is named and the package is not installed here."""
    check(
        project == "" or find_spec("wandb") is not None,
        f"train.wandb={project} needs the package wandb; pip install 'bowstring[wandb]', or set "
        "train.wandb= to do without",
    )


class Wandb(Callback):
    """A run of its own at W&B that goes on after every start."""

    def __init__(
        self,
        project: str,
        run: files.RunDir,
        settings: dict[str, Any],
        say: Callable[[events.WandbFailed], None],
    ) -> None:
        """`settings` is shown beside the run; `say` takes the event of the service's failure.

        Raises:
            ConfigError: the package is not installed.
        """
        check_wandb(project)
        self._project, self._files, self._settings, self._say = project, run, settings, say
        self._run: Any = None

    def begin(self, done: int) -> None:
        """Raises ConfigError: the service does not know who asks."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # only what was asked for is sent
        import wandb

        self._failures = (wandb.Error, OSError, TimeoutError)
        try:
            self._run = wandb.init(
                project=self._project,
                id=_run_id(self._files.wandb / "id"),
                name=self._files.root.name,
                dir=self._files.root,
                config=self._settings,
                allow_val_change=True,  # a resume may train longer
                resume="allow",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_code=True,
                    disable_git=True,
                    finish_timeout=FINISH_TIMEOUT_S,
                ),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"train.wandb={self._project}: {' '.join(str(error).split())}; set WANDB_API_KEY "
                "in the environment, or WANDB_MODE=offline, or train.wandb="
            ) from error
        except self._failures as error:
            self._give_up(error)

    def record(self, done: int, metrics: dict[str, Any]) -> None:
        """The service leaves out a step that it has."""
        if self._run is None:
            return
        try:
            self._run.log(dict(scalars(metrics)), step=done)
        except self._failures as error:
            self._give_up(error)

    def close(self) -> None:
        """Sends what is left, for a minute at most; `wandb sync` sends what remains."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except self._failures as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        self._say(events.WandbFailed(" ".join(str(error).split()) or repr(error)))


def _run_id(path: Path) -> str:
    """The id in the file, which is made at the first start."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, uuid4().hex.encode())
    return path.read_text()
