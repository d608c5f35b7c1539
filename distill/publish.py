"""The changes to `shards/`: publish a shard, set a bad one aside, clear what killed workers left.

    tar written and flushed under a temporary name
      -> named 00000017.tar    by a link, which never replaces anything
      -> named 00000017.json   its sidecar, likewise: the shard is committed

Whoever comes second finds the sidecar and drops its own. A tar without a sidecar is of a producer
that was killed in between: it stays if it has the same bytes, else it is replaced. Publishing and
setting aside exclude each other by a file lock. Where the file system has no locks, two producers
of one shard may at worst leave a tar that does not match its sidecar; readers detect that and the
shard is made again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.ledger import (
    CorruptShard,
    Sidecar,
    check_size,
    check_spec,
    read_sidecar,
    sidecar_path,
    tar_path,
)
from distill.manifest import sha256_file
from distill.rundir import RunDir, sync_directory, write_json

TEMPORARY = re.compile(r"\.\d{8,}\.(?:tar|json)\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
STALE_S = 3600.0  # a temporary file that rests this long has no live producer
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def temporary_path(final: Path) -> Path:
    """A name next to `final` that is this process's own and that no reader looks at."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return final.with_name(f".{final.name}.tmp-{owner}")


def publish(run: RunDir, sidecar: Sidecar, written: Path) -> Sidecar:
    """The sidecar that stands after committing the tar in `written`: ours, or an earlier one's.

    `written` is complete, flushed to disk and in `run.shards`; the caller removes it.

    Raises:
        ForeignShard: the place is taken by a shard of another run.
    """
    with _locked(run):
        standing = _standing(run, sidecar)
        if standing is not None:
            return standing
        tar, record = tar_path(run, sidecar.shard), sidecar_path(run, sidecar.shard)
        try:
            _claim(written, tar)
        except FileExistsError:
            if sha256_file(tar) != sidecar.sha256:
                written.replace(tar)
        sync_directory(run.shards)  # the tar's name is durable before its sidecar is
        temporary = temporary_path(record)
        try:
            with temporary.open("wb") as file:
                file.write(sidecar.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            _claim(temporary, record)
        except FileExistsError:  # only where the file system has no locks
            return read_sidecar(run, sidecar.shard)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(run.shards)
    return sidecar


def _claim(source: Path, name: Path) -> None:
    """Gives `source` a name that must be free; FileExistsError when it is not.

    A link decides that in one step. Without hard links the lock of `publish` has to do.
    """
    try:
        os.link(source, name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if name.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from error
        source.rename(name)


def _standing(run: RunDir, sidecar: Sidecar) -> Sidecar | None:
    """The committed sidecar in this shard's place. One that cannot be right is set aside."""
    shard = sidecar.shard
    try:
        standing = read_sidecar(run, shard)
        check_spec(run, standing, sidecar.spec)
        check_size(run, standing, tar_path(run, shard).stat().st_size)
    except FileNotFoundError:
        if sidecar_path(run, shard).exists():
            _set_aside(run, shard, "its tar is missing")
        return None
    except CorruptShard as error:
        _set_aside(run, shard, str(error))
        return None
    return standing


def mark(run: RunDir, shard: int) -> int:
    """A number that tells this commit of a shard from a later one; FileNotFoundError if none."""
    return sidecar_path(run, shard).stat().st_ino


def quarantine(run: RunDir, shard: int, reason: str, seen: int) -> Path | None:
    """The folder in `quarantine/` that took the shard, which is then to be made again.

    `seen` is the `mark` of the commit that was found bad. None when another reader has set that one
    aside already.
    """
    with _locked(run):
        try:
            if mark(run, shard) != seen:
                return None
        except FileNotFoundError:
            return None
        return _set_aside(run, shard, reason)


def _set_aside(run: RunDir, shard: int, reason: str) -> Path:
    """Reason first and sidecar second, so whenever this is cut off, nothing bad is committed."""
    folder = run.quarantine / f"{shard:08d}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    record = {"shard": shard, "reason": reason, "time": round(time.time(), 3)}
    write_json(folder / f"{shard:08d}.reason.json", record)
    for path in (sidecar_path(run, shard), tar_path(run, shard)):
        if path.exists():
            path.rename(folder / path.name)
            sync_directory(run.shards)
    sync_directory(folder)
    return folder


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


@contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    """Excludes other changes to `shards/`. The lock of a killed process is free at once."""
    with (run.shards / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
