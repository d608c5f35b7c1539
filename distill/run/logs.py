"""What the processes of a run print, kept in the run: by start, node and process. Standard library
only.

    logs/now                                    name of the newest start
    logs/1204.0/node7/rank-00003.txt            what a trainer rank printed
    logs/1204.0/node7/rank-00003.txt.1          and before, when that became too long
    logs/1204.0/node7/worker-4711.txt           a teacher worker, by its process id
    logs/1204.0/node7/ray/raylet.out            the last of Ray's own words, after it failed

A start is a Slurm job with its restarts, or the time. The file takes the place of the process's
standard output and error, so what libraries of other languages print is in it too, and what a
process says as it crashes.
"""

import os
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from distill.run.files import RunDir, write_atomic

MAX_BYTES = 4 * 2**20  # of a process: a file and the one before it
CHECK_PERIOD_S = 2.0
MAX_STARTS = 20  # older ones go
RAY_BYTES = 200_000  # of each of Ray's own files


def begin(run: RunDir) -> None:
    """Begins the folder of a start, and removes those of old ones. For who holds the run's lock."""
    job = os.environ.get("SLURM_JOB_ID")
    again = os.environ.get("SLURM_RESTART_COUNT", "0")
    name = f"{job}.{again}" if job else time.strftime("%Y%m%d-%H%M%S")
    with suppress(OSError):  # as below
        (run.logs / name).mkdir(parents=True, exist_ok=True)
        os.utime(run.logs / name)  # the newest, also where its job began twice
        write_atomic(run.logs / "now", f"{name}\n".encode())
        for old in starts(run)[:-MAX_STARTS]:
            if old.name != name:  # a node's clock may be behind
                shutil.rmtree(old, ignore_errors=True)


def starts(run: RunDir) -> list[Path]:
    """Folders of the starts, the newest last."""
    try:
        there = [entry for entry in os.scandir(run.logs) if entry.is_dir()]
    except FileNotFoundError:
        return []
    return [Path(e.path) for e in sorted(there, key=lambda e: (e.stat().st_mtime, e.name))]


def now(run: RunDir) -> Path | None:
    """Folder of the newest start; None before the first."""
    try:
        return run.logs / (run.logs / "now").read_text().strip()
    except FileNotFoundError:
        return None


def here(run: RunDir) -> Path | None:
    """Folder of this node in the newest start."""
    folder = now(run)
    return folder / socket.gethostname() if folder else None


def words(run: RunDir) -> str:
    """What to add to an error of a process of the run: where its words are; "" if nowhere."""
    folder = now(run)
    found = folder is not None and any(folder.glob("*/*.txt"))
    return f"; what its processes printed is in {folder} (bowstring logs)" if found else ""


def rank_name(rank: int) -> str:
    """File of a trainer rank."""
    return f"rank-{rank:05d}.txt"


def worker_name(pid: int) -> str:
    """File of a teacher worker."""
    return f"worker-{pid}.txt"


def keep(run: RunDir, name: str) -> None:
    """From now on what this process prints is in file `name` of its node, with a bound on its size.

    Where that cannot be made, all stays as it is: no run fails for want of its log.
    """
    folder = here(run)
    if folder is None:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        _redirect(path)
        os.write(1, f"---- {time.strftime('%F %T')}, process {os.getpid()}\n".encode())
        threading.Thread(target=_bound, args=(path,), name="logs", daemon=True).start()


def _redirect(path: Path) -> None:
    """Opens `path` in place of standard output and error, in one step each."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _bound(path: Path) -> None:
    """Goes on in a new file where this one is too long."""
    while True:
        time.sleep(CHECK_PERIOD_S)
        with suppress(OSError):
            if os.fstat(1).st_size > MAX_BYTES // 2:
                path.replace(path.with_name(path.name + ".1"))
                _redirect(path)


def keep_ray(run: RunDir, session: Path) -> Path | None:
    """Folder with the last of what Ray wrote in its session on this node; None if that is not to be
    had.
    """
    folder = here(run)
    if folder is None:
        return None
    kept = folder / "ray"
    found = False
    with suppress(OSError):
        for path in sorted((session / "logs").iterdir()):
            if path.is_file() and path.stat().st_size:
                kept.mkdir(parents=True, exist_ok=True)
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - RAY_BYTES))
                    (kept / path.name).write_bytes(file.read())
                found = True
    return kept if found else None
