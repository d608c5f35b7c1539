"""A rank that takes no step for too long says where it stands, and ends. No torch, no ray.

    hangs/rank_00001.txt   the time, and the stacks of all threads of that rank

All ranks of a group take the same steps, so when one hangs, all do. Each waits for the others to
write their stacks before it ends: the end of one breaks the collective that the others hang in. The
supervisor then starts the group again.

A thread of Python watches. One that hangs with Python's global lock in its hands holds that thread
up as well; then a timer of faulthandler, which needs no lock, writes the stacks and ends the rank.
A rank that is frozen whole (SIGSTOP) does neither: the others of its group end, and Ray Train ends
one that answers nothing for as long as a step may take (`cluster.supervisor.session`).
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

GRACE_S, POLL_PERIOD_S = 10.0, 1.0


@contextmanager
def ending_when_hung(path: Path, timeout_s: float) -> Iterator[Callable[[], None]]:
    """A function to be called at every step, and again and again in a wait that is meant to last.

    `timeout_s` after the last call the stacks are added to `path`, and after GRACE_S the process
    ends with exit code 1, unless the block has ended by then; after half of it where the lock is
    held, so that these stacks too are there before the others end.

    Raises:
        OSError: the file cannot be made.
    """
    deadline, done = time.monotonic() + timeout_s, threading.Event()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")

    def beat() -> None:
        nonlocal deadline
        deadline = time.monotonic() + timeout_s
        faulthandler.dump_traceback_later(timeout_s + GRACE_S / 2, exit=True, file=file)

    def watch() -> None:
        while time.monotonic() < deadline:
            if done.wait(POLL_PERIOD_S):
                return
        faulthandler.cancel_dump_traceback_later()  # the lock is free, and GRACE_S is given
        try:
            file.write(f"{datetime.now():%F %T}: no step for more than {timeout_s:g} s\n")
            file.flush()
            faulthandler.dump_traceback(file)
        finally:  # also when the disk is full
            if not done.wait(GRACE_S):
                os._exit(1)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    beat()
    thread.start()
    try:
        yield beat
    finally:
        done.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):  # a full disk
            file.close()
        if path.stat().st_size == 0:
            path.unlink()
            with suppress(OSError):  # other ranks have files there
                path.parent.rmdir()


def stacks_bytes(folder: Path) -> int:
    """Bytes that ranks have written there: more than before means that one of them has hung.

    Sizes, since the clocks of this machine, of the ranks' and of the file server may differ.
    """
    return sum(path.stat().st_size for path in folder.glob("rank_*.txt"))
