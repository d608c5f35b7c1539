"""A rank that takes no step for too long says where it stands, and ends. No torch, no ray.

    hangs/rank_00001.txt   the time, and the stacks of all threads of that rank

All ranks of a group take the same steps, so when one hangs, all do. Each waits for the others to
write their stacks before it ends: the end of one breaks the collective that the others hang in. The
supervisor then starts the group again.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

GRACE_S, POLL_PERIOD_S = 10.0, 1.0


@contextmanager
def ending_when_hung(path: Path, timeout_s: float) -> Iterator[Callable[[float], None]]:
    """A function to be called at every step, with seconds that are granted on top.

    Without a call for `timeout_s` and these, the stacks are added to `path`, and after GRACE_S the
    process ends with exit code 1, unless the block has ended by then.
    """
    deadline, done = time.monotonic() + timeout_s, threading.Event()

    def beat(more_s: float) -> None:
        nonlocal deadline
        deadline = time.monotonic() + timeout_s + more_s

    def watch() -> None:
        while time.monotonic() < deadline:
            if done.wait(POLL_PERIOD_S):
                return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{datetime.now():%F %T}: no step for more than {timeout_s:g} s\n")
                file.flush()
                faulthandler.dump_traceback(file)
        finally:  # also when the disk is full
            if not done.wait(GRACE_S):
                os._exit(1)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield beat
    finally:
        done.set()


def has_hung(folder: Path, since: float) -> bool:
    """Whether a rank has written its stacks there after `since` (Unix time)."""
    return any(path.stat().st_mtime >= since for path in folder.glob("rank_*.txt"))
