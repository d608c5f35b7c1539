"""`bowstring stop RUN` of a run that works without Slurm: its supervisor is asked as by SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import socket

from cluster.status import is_live
from distill.config import check
from distill.rundir import RunDir


def stop_here(run: RunDir) -> str:
    """Asks the supervisor of a live run on this machine to save and end. What was done, in words.

    Raises:
        ConfigError: the run is at rest, or its supervisor works on another machine.
    """
    check(is_live(run), f"{run.root} is not running, and has no Slurm jobs")
    holder = json.loads(run.lock.read_text())
    host, pid = holder["host"], holder["pid"]
    check(
        host == socket.gethostname(),
        f"{run.root} is worked on by process {pid} on {host}; run `bowstring stop` there",
    )
    os.kill(pid, signal.SIGTERM)
    return f"process {pid}: saves, then ends"
