"""Shards in a local folder, which may be on a file system that several machines share.

    tar written and flushed under a temporary name
      -> named 00000017.tar    by a link, which never replaces anything
      -> named 00000017.json   its sidecar, likewise: the shard is committed

Whoever comes second finds the sidecar and drops its own. A tar without a sidecar is of a producer
that was killed in between: it stays if it has the same bytes, else it is replaced. Publishing and
setting aside exclude each other by a file lock. Where the file system has no locks, two producers
of one shard may at worst leave a tar that does not match its sidecar; readers detect that and the
shard is made again. Names that start with a dot are in the making or left by a killed process; no
reader looks at them.
"""

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from distill.data.sidecar import SHARD_NAME, CorruptShard, Listing, Reason, Sidecar
from distill.run import files, records

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class LocalStore:
    """The `distill.data.stores.store.ShardStore` in the folder `run.shards`; what is bad goes to
    `run.quarantine`.
    """

    run: files.RunDir
    pause_s = 0.0

    @property
    def root(self) -> str:
        """The folder."""
        return str(self.run.shards)

    def place(self, shard: int) -> str:
        """The path of the tar."""
        return str(self.run.tar(shard))

    # ---------------------------------------------------------------------------------------
    # Read

    def listing(self) -> Listing:
        """Looks at names and sizes only."""
        return files.patiently(self._listing)

    def _listing(self) -> Listing:
        sizes: dict[int, int] = {}
        sidecars: set[int] = set()
        if self.run.shards.is_dir():
            with os.scandir(self.run.shards) as entries:
                for entry in entries:
                    stem, _, kind = entry.name.partition(".")
                    if not SHARD_NAME.fullmatch(stem):
                        continue
                    if kind == "json":
                        sidecars.add(int(stem))
                    elif kind == "tar":
                        with suppress(FileNotFoundError):  # quarantined meanwhile
                            sizes[int(stem)] = entry.stat().st_size
        return Listing(
            committed={shard: sizes[shard] for shard in sorted(sizes.keys() & sidecars)},
            orphans=tuple(f"{files.shard_name(n)}.tar" for n in sorted(sizes.keys() - sidecars)),
            without_tar=tuple(sorted(sidecars - sizes.keys())),
        )

    def has(self, shard: int) -> bool:
        """Whether a shard is committed."""
        return files.is_there(self.run.sidecar(shard)) and files.is_there(self.run.tar(shard))

    def mark(self, shard: int) -> str:
        """The sidecar's inode."""
        return str(files.patiently(self.run.sidecar(shard).stat).st_ino)

    def sidecar(self, shard: int) -> bytes:
        """The content of a sidecar."""
        return files.read_bytes(self.run.sidecar(shard))

    def sidecars(self) -> Iterator[bytes]:
        """The content of every sidecar, by number."""
        for path in sorted(self.run.shards.glob("*.json")):
            yield files.read_bytes(path)

    def read_tar(self, sidecar: Sidecar) -> bytes:
        """The tar, read in one go."""
        place = self.place(sidecar.shard)
        content = files.read_bytes(self.run.tar(sidecar.shard))
        sidecar.check_size(place, len(content))
        sidecar.check_sha256(place, hashlib.sha256(content).hexdigest())
        return content

    def verify(self, sidecar: Sidecar) -> None:
        """Hashes the file piece by piece."""
        place, path = self.place(sidecar.shard), self.run.tar(sidecar.shard)
        sidecar.check_size(place, files.patiently(path.stat).st_size)
        sidecar.check_sha256(place, files.sha256_file(path))

    # ---------------------------------------------------------------------------------------
    # Publish

    @contextmanager
    def room_for(self, shard: int) -> Iterator[Path]:
        """A temporary name next to the final one."""
        self.run.shards.mkdir(parents=True, exist_ok=True)
        temporary = files.temporary_path(self.run.tar(shard))
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def publish(self, sidecar: Sidecar, written: Path) -> Sidecar:
        """Links the tar, then the sidecar. `written` is flushed to disk."""
        with self._locked():
            standing = self._standing(sidecar)
            if standing is not None:
                return standing
            tar, record = self.run.tar(sidecar.shard), self.run.sidecar(sidecar.shard)
            try:
                _claim(written, tar)
            except FileExistsError:
                if files.sha256_file(tar) != sidecar.sha256:
                    written.replace(tar)
            files.sync_directory(self.run.shards)  # the tar's name is durable before its sidecar is
            temporary = files.temporary_path(record)
            try:
                with temporary.open("wb") as file:
                    file.write(sidecar.to_bytes())
                    file.flush()
                    os.fsync(file.fileno())
                _claim(temporary, record)
            except FileExistsError:  # only where the file system has no locks
                return self._read_sidecar(sidecar.shard)
            finally:
                temporary.unlink(missing_ok=True)
            files.sync_directory(self.run.shards)
        return sidecar

    def _read_sidecar(self, shard: int) -> Sidecar:
        return Sidecar.parse(self.place(shard), shard, self.sidecar(shard))

    def _standing(self, sidecar: Sidecar) -> Sidecar | None:
        """The committed sidecar in this shard's place. One that cannot be right is set aside."""
        shard, place = sidecar.shard, self.place(sidecar.shard)
        try:
            standing = self._read_sidecar(shard)
            standing.check_spec(place, sidecar.spec)
            standing.check_size(place, self.run.tar(shard).stat().st_size)
        except FileNotFoundError:
            if self.run.sidecar(shard).exists():
                self._set_aside(shard, "its tar is missing")
            return None
        except CorruptShard as error:
            self._set_aside(shard, str(error))
            return None
        return standing

    # ---------------------------------------------------------------------------------------
    # Take away

    def quarantine(self, shard: int, reason: str, seen: str) -> str | None:
        """The folder below `run.quarantine`."""
        with self._locked():
            try:
                if self.mark(shard) != seen:
                    return None
            except FileNotFoundError:
                return None
            return self._set_aside(shard, reason)

    def _set_aside(self, shard: int, reason: str) -> str:
        """Reason first, sidecar second: whenever this is cut off, nothing bad is committed."""
        folder = self.run.quarantine / f"{files.shard_name(shard)}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        files.write_json(
            folder / f"{files.shard_name(shard)}.reason.json",
            records.tree_of(Reason(shard, reason)),
        )
        for path in (self.run.sidecar(shard), self.run.tar(shard)):
            if path.exists():
                path.rename(folder / path.name)
                files.sync_directory(self.run.shards)
        files.sync_directory(folder)
        return str(folder)

    def reasons(self) -> dict[str, bytes]:
        """The reasons in `run.quarantine`."""
        return local_reasons(self.run)

    def delete_tars(self, shards: Iterable[int]) -> None:
        """Deletes one tar after the other."""
        for shard in shards:
            self.run.tar(shard).unlink(missing_ok=True)

    def clear(self) -> list[str]:
        """Removes temporary files whose producer is dead."""
        return [path.name for path in files.clean_temporaries(self.run.shards)]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Excludes other changes to the folder. The lock of a killed process is free at once."""
        with (self.run.shards / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            yield


def local_reasons(run: files.RunDir) -> dict[str, bytes]:
    """Content of every reason below `run.quarantine`, by the name of its folder."""
    paths = sorted(run.quarantine.glob("*/*.reason.json"))
    return {path.parent.name: files.read_bytes(path) for path in paths}


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
