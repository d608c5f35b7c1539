"""The teachers' arrays of a run on Slurm end with the production: what is idle is paid for.

slurm/made        all shards are made: a task that sees it leaves, and holds its array
slurm/held/ID     an array that a task of it has held
"""

import threading
import time

from cluster.slurm import jobs
from distill.config import ConfigError
from distill.run.files import RunDir

AGAIN_S = 30.0  # a task that held its array just now had not heard of it


class Arrays:
    """Tells the arrays of one run how far the production is."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._is_made: bool | None = None  # as they were told

    def follow(self, is_made: bool) -> None:
        """Whether all shards are made. Some of them may be lost later."""
        if is_made == self._is_made or not self._run.slurm.is_dir():
            return
        self._is_made, made = is_made, self._run.slurm / "made"
        if is_made:
            made.touch()
        else:
            made.unlink(missing_ok=True)
            threading.Thread(target=self._release, name="release", daemon=True).start()

    def _release(self) -> None:
        """Lets the tasks of arrays that were held start again. Slurm may take its time."""
        for pause_s in (0.0, AGAIN_S):
            time.sleep(pause_s)
            if self._is_made:
                return
            for held in sorted((self._run.slurm / "held").glob("*")):
                try:
                    jobs.ask("scontrol", "release", held.name)
                except (ConfigError, jobs.SlurmError):
                    continue  # there is no such array any more
                if pause_s:
                    held.unlink(missing_ok=True)
