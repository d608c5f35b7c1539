"""`bowstring stop RUN` of a run that works without Slurm: its supervisor is asked as by SIGTERM."""

from __future__ import annotations

import os
import signal
import socket

from cluster.state.lock import holder
from distill.config import ConfigError, check
from distill.run.dir import RunDir


def stop_here(run: RunDir) -> str:
    """Asks the supervisor of a live run on this machine to save and end. What was done, in words.

    Raises:
        ConfigError: the run is at rest or about to start, or its supervisor is on another machine.
    """
    found = holder(run)
    if found is None:
        raise ConfigError(f"{run.root} is not running, and has no Slurm jobs")
    check(
        found.host == socket.gethostname(),
        f"{run.root} is worked on by process {found.pid} on {found.host}; "
        "run `bowstring stop` there",
    )
    os.kill(found.pid, signal.SIGTERM)
    return f"process {found.pid}: saves, then ends"
