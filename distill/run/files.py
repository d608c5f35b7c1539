"""The files of a run: their names; and how they are written whole or by the line, locked, hashed.
Standard library only.

A run directory is the whole truth about a run; every process can be killed and the run goes on
from its files.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

# -----------------------------------------------------------------------------------------------
# Names


def shard_name(shard: int) -> str:
    """What the names of a shard's files begin with."""
    return f"{shard:08d}"


class _Inside:
    """A path below the run's folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunDir", kind: type) -> Path:
        return run.root / self._name


@dataclass(frozen=True)
class RunDir:
    """Paths of a run below `root` (docs/formats.md).

    Attributes:
        root: the run's folder.
        location: where its shards lie: a folder, a URL, or "" for `shards` below `root`
            (`distill.data.stores.store`).
    """

    root: Path
    location: str = ""

    identity = _Inside("run.json")  # what determines data and weights
    config = _Inside("config.yaml")  # the composed configuration of the last start
    cache = _Inside("cache")  # copies of shards that lie in an object store
    evicted = _Inside("evicted.json")  # shards that were deleted for room
    quarantine = _Inside("quarantine")  # bad shards, each with its reason
    checkpoints = _Inside("checkpoints")  # those committed, and the `latest` pointer
    events = _Inside("events.jsonl")  # what happened
    metrics = _Inside("metrics.jsonl")  # loss terms and speed by step
    tensorboard = _Inside("tensorboard")  # a copy of the metrics
    wandb = _Inside("wandb")  # W&B's own files, and the run's id there
    profile = _Inside("profile")  # traces of a few steps by torch.profiler
    hangs = _Inside("hangs")  # where the ranks stood that took no step for too long
    logs = _Inside("logs")  # what ranks and workers print (`distill.run.logs`)
    cursor = _Inside("cursor.json")  # the block the trainer reads
    target = _Inside("target.json")  # how many teacher workers a live run shall have
    results = _Inside("results.json")  # the evaluation
    report = _Inside("report.html")
    samples = _Inside("samples")  # PNG grids and npz files
    slurm = _Inside("slurm")  # what `bowstring submit` writes: scripts, logs, ids of the jobs
    lock = _Inside("run.lock")  # held by the supervisor of a live run
    trainer_lock = _Inside("trainer.lock")  # held by rank 0 of a live trainer group

    @property
    def shards(self) -> Path:
        """Committed trajectory shards and their sidecars, where they lie in a folder."""
        return Path(self.location) if self.location else self.root / "shards"

    def tar(self, shard: int) -> Path:
        """The tar of a shard in a local folder."""
        return self.shards / f"{shard_name(shard)}.tar"

    def sidecar(self, shard: int) -> Path:
        """The sidecar of a shard in a local folder."""
        return self.shards / f"{shard_name(shard)}.json"

    @property
    def teacher(self) -> "RunDir":
        """The pre-training of a teacher is a run of its own, inside."""
        return RunDir(self.root / "teacher")

    def model(self, step: int) -> Path:
        """Folder of the model exported at `step`."""
        return self.root / "models" / f"step_{step:08d}"


# -----------------------------------------------------------------------------------------------
# A file system that several machines share

T = TypeVar("T")
# What it answers for a moment: where a file was just replaced, or a server is away.
PASSING = (errno.ESTALE, errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESHUTDOWN)
PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # between the tries of a read
LOOKS = 3  # pauses, of these, that content which is not whole is worth


def passes(error: BaseException) -> bool:
    """Whether the same read may succeed a little later."""
    return isinstance(error, OSError) and error.errno in PASSING


def patiently(read: Callable[[], T], *torn: type[Exception]) -> T:
    """What `read` returns, which is tried again for some seconds while the file system answers with
    an error of PASSING, and for a moment where it raises one of `torn`: another machine may see a
    file half written.
    """
    for tries, pause_s in enumerate(PAUSES_S):
        try:
            return read()
        except torn:
            if tries >= LOOKS:
                raise
        except OSError as error:
            if not passes(error):
                raise
        time.sleep(pause_s)
    return read()


@contextmanager
def next_time() -> Iterator[None]:
    """Around a look that is made again and again: a passing error in it leaves that to the next."""
    try:
        yield
    except OSError as error:
        if not passes(error):
            raise


def is_there(path: Path) -> bool:
    """Whether there is a file of that name. One that cannot be seen is not taken for missing."""
    try:
        patiently(path.stat)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises as `open` does, after some tries."""
    return patiently(path.read_bytes)


# -----------------------------------------------------------------------------------------------
# Content


def lock_file(descriptor: int, patience_s: float) -> None:
    """Takes the exclusive lock of an open file. It ends with the process that holds it.

    Raises:
        BlockingIOError: another process held it for `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def sync_directory(path: Path) -> None:
    """Makes renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` by temporary file, fsync, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name and place once all in it is written.

    So a reader sees the old one or the new one. What fails on the way leaves the old one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    temporary = folder.with_name(f".{folder.name}.tmp-{unique}")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{unique}")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(folder.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Appends JSON lines by a single write, so that writers do not mix.

    A line torn by a crash is closed first, so it costs itself only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        data = text.encode()
        while data:  # a nearly full disk takes a part, and says so at the rest
            data = data[os.write(file.fileno(), data) :]
        os.fsync(file.fileno())  # a checkpoint must not be ahead of the record of its data


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; torn lines are left out."""
    return (record for _, record in numbered_lines(path) if record is not None)


def numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number from 1, record) of every line of a JSON-lines file; None for a torn one."""
    number = offset = 0
    while lines := patiently(partial(_lines_from, path, offset)):
        for line in lines:
            number, offset = number + 1, offset + len(line)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, or not text at all
                record = None
            yield number, record if isinstance(record, dict) else None


def _lines_from(path: Path, offset: int) -> list[bytes]:
    """Some lines of a file; none at its end, or where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.readlines(1 << 20)
    except FileNotFoundError:
        return []


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    return patiently(partial(_sha256, path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:  # hashlib.file_digest needs Python 3.11
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


TEMPORARY = re.compile(r"\.\d{8,}\.(?:tar|json)\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
STALE_S = 3600.0  # what rests this long without its final name has no live producer


def temporary_path(final: Path) -> Path:
    """A name next to `final` that is this process's own and that no reader looks at."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return final.with_name(f".{final.name}.tmp-{owner}")


def clean_temporaries(folder: Path) -> list[Path]:
    """The temporary files in `folder` that were removed: those whose producer is dead.

    On this machine that is seen from the process; elsewhere a file that rests for an hour counts.
    """
    removed = []
    for path in sorted(folder.glob(".*.tmp-*")):
        match = TEMPORARY.fullmatch(path.name)
        try:
            rests_s = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        here = match is not None and match["host"] == socket.gethostname()
        if rests_s > STALE_S or (match is not None and here and not _is_alive(int(match["pid"]))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
