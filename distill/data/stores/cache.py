"""Copies of shards that lie in an object store, on the disk of the machine that reads them."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.data.sidecar import Sidecar
from distill.run.files import write_atomic

CACHE_BYTES = 4 * 2**30  # those that were not read for longest are deleted beyond this


class ShardCache:
    """Copies of tars in a local folder that the ranks of a machine share, at most CACHE_BYTES.

    A name belongs to one producer's tar for ever, so a copy is never out of date. It may be deleted
    at any time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, sidecar: Sidecar) -> Path:
        return self._folder / sidecar.tar_name

    def read(self, sidecar: Sidecar) -> bytes | None:
        """A copy that is whole, byte for byte."""
        path = self._path(sidecar)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest() != sidecar.sha256:
            return None
        _touch(path)
        return content

    def add(self, sidecar: Sidecar, content: bytes) -> None:
        """Keeps a copy, and deletes those that were not read for longest. Needs the lock."""
        write_atomic(self._path(sidecar), content)
        _touch(self._path(sidecar))
        for path in self._folder.glob(".*.tmp-*"):  # we hold the lock, so its process is dead
            path.unlink()
        copies = sorted(self._folder.glob("*.tar"), key=lambda path: -path.stat().st_mtime_ns)
        room = CACHE_BYTES
        for path in copies:
            room -= path.stat().st_size
            if room < 0:
                path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process downloads; the others then find the copy."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _touch(path: Path) -> None:
    """Marks a copy as read now; the kernel's own times are too coarse to keep the order."""
    now = time.time_ns()
    with suppress(FileNotFoundError):  # another process needed its room
        os.utime(path, ns=(now, now))
