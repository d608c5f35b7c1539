"""The lock of a run: one supervisor at a time. It ends with the process that holds it.

run.lock holds {"host", "pid"} of the supervisor that took it last. No torch, no ray.
"""

import fcntl
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from distill.config import ConfigError, check
from distill.run.files import RunDir, lock_file, patiently

PATIENCE_S = 3.0  # `bowstring status` holds the lock for an instant to look at it


class Holder(NamedTuple):
    """A supervisor."""

    host: str
    pid: int


@contextmanager
def held(run: RunDir, patience_s: float = 0.0) -> Iterator[None]:
    """The run is this process's own, when another supervisor has left it within `patience_s`.

    Raises:
        ConfigError: the folder cannot be made, or another supervisor is at work on the run.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        file = run.lock.open("a+")
    except OSError as error:
        raise ConfigError(
            f"cannot write to run.dir={run.root} ({error.strerror}); choose another place with "
            "run.dir=..."
        ) from error
    with file:
        if patience_s and is_live(run):
            print(f"{run.root} is left by {run.lock.read_text()} first", flush=True)
        try:
            lock_file(file.fileno(), max(patience_s, PATIENCE_S))
        except BlockingIOError:
            raise ConfigError(
                f"{run.root} is being worked on by another process ({run.lock.read_text()}); "
                "wait for it, or start a new run with --force-new NAME"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"the file system of run.dir={run.root} has no locks ({error.strerror}): two "
                "commands could work on one run; mount it with them (Lustre: -o flock), or choose "
                "another place with run.dir=...; shards alone may lie anywhere "
                "(trajectory.location)"
            ) from error
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield


def is_live(run: RunDir) -> bool:
    """Whether a supervisor holds the run now."""
    try:
        with patiently(partial(run.lock.open, "rb")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks holds no run
        return False
    return False


def holder(run: RunDir) -> Holder | None:
    """Who holds the run now; None when nobody does, or somebody is about to."""
    if not is_live(run):
        return None
    try:
        return Holder(**json.loads(run.lock.read_text()))
    except json.JSONDecodeError:
        return None


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
