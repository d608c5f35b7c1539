"""Which shards are there, looked for by one process of a machine.

Ranks of a node wait for the same shards, and each question costs the file server. So the answer to
one of them lies in the machine's own temporary folder, for the others, as long as it is fresh:

    {"seen": {"17": [when, in seconds since the machine started, 1 if shard 17 was there]}}

Nobody is in charge: who finds no fresh answer looks, while the others wait for the file's lock.
Where there is no such folder, or it has no locks, every process looks for itself.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from distill.data.stores.store import open_store
from distill.run import files, records

SHORTEST_S, LONGEST_S = 0.1, 5.0  # between two looks at a folder
SLOWER = 1.3  # times as long is the next pause when nothing came
FORGET_S = 60.0  # after which an answer helps nobody


@dataclass(frozen=True)
class Answers:
    """The file."""

    seen: dict[str, tuple[float, ...]]


class Lookout:
    """One reader's looks. They become rarer as long as nothing comes."""

    def __init__(self, run: files.RunDir) -> None:
        self._store = open_store(run)
        name = f"{os.getuid()} {run.root.absolute()} {run.location}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._path = Path(tempfile.gettempdir()) / f"bow-{digest}.seen"
        self.pause_s = self._shortest_s = max(SHORTEST_S, self._store.pause_s)

    def found(self, missing: Sequence[int]) -> list[int]:
        """Those of `missing` that are there now, or were when another process looked just now."""
        try:
            with self._answers() as file:
                there = self._ask(file, missing)
        except (OSError, ValueError, IndexError):
            there = {shard: self._store.has(shard) for shard in missing}
        come = [shard for shard in missing if there[shard]]
        slower_s = min(SLOWER * self.pause_s, max(LONGEST_S, self._shortest_s))
        self.pause_s = self._shortest_s if come else slower_s
        return come

    def close(self) -> None:
        """Takes the answers away. Who still waits makes new ones."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    @contextmanager
    def _answers(self) -> Iterator[TextIO]:
        """The file, locked. It is ours alone: the folder belongs to everybody."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(self._path, flags, 0o600), "r+") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                raise PermissionError(f"{self._path} is somebody else's")
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _ask(self, file: TextIO, missing: Sequence[int]) -> dict[int, bool]:
        """Whether each of some shards is there; from the file, or seen and then written there."""
        try:
            seen = records.parse_record(Answers, file.read()).seen
        except records.RecordError:  # new, or torn
            seen = {}
        now = time.monotonic()
        for shard in missing:
            at, *_ = seen.get(str(shard), (-FORGET_S,))
            if not 0 <= now - at < self.pause_s:
                seen[str(shard)] = (now, float(self._store.has(shard)))
        fresh = {shard: one for shard, one in seen.items() if 0 <= now - one[0] < FORGET_S}
        file.seek(0)
        json.dump(records.tree_of(Answers(fresh)), file)
        file.truncate()
        return {shard: bool(seen[str(shard)][-1]) for shard in missing}
