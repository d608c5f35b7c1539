"""Shards in an object store: no shared file system, no renames, no locks.

    tar put under a name of this producer alone      00000017.3f2a9c0d11e27b45.tar
      -> 00000017.json   its sidecar, which names the tar: put only if there is none yet

So two producers of one shard never mix, and the second drops its own. S3 refuses a second sidecar.
A store that knows no such condition may let a second one replace the first; then the second stands,
with a tar of its own that is as whole. A tar that no sidecar names is of a producer that is at work
or was killed.

Readers work on a copy in a cache on their own disk. Bad shards go below `quarantine` in the store.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from distill.data.sidecar import SHARD_NAME, TAR_NAME, CorruptShard, Listing, Reason, Sidecar
from distill.data.stores import local, objects
from distill.run import files, records

PIECE_BYTES = 16 * 2**20  # of a tar, while its hash is taken
SIDECARS_AT_ONCE = 256
CACHE_BYTES = 4 * 2**30  # those that were not read for longest are deleted beyond this


class ObjectStore:
    """The `distill.data.stores.store.ShardStore` at `run.location`."""

    pause_s = 1.0

    def __init__(self, run: files.RunDir) -> None:
        """Raises ConfigError when the package for such a URL is missing."""
        self._run, self._objects = run, objects.Objects(run.location)
        self._cache = ShardCache(run.cache)
        self._tars: dict[int, str] = {}  # shard -> the tar that its sidecar was seen to name

    @property
    def root(self) -> str:
        """The URL."""
        return self._run.location

    def place(self, shard: int) -> str:
        """The shard's number below the URL."""
        return f"{self.root.rstrip('/')}/{files.shard_name(shard)}"

    # ---------------------------------------------------------------------------------------
    # Read

    def listing(self) -> Listing:
        """Names and sizes; and a sidecar when its shard was not seen before."""
        sidecars, tars = self._names()
        self._look_up([n for n in sidecars & tars.keys() if self._tars.get(n) not in tars[n]])
        found: dict[int, int] = {}
        for shard in sorted(sidecars & tars.keys()):
            # A sidecar that is damaged names nothing. A reader has to find it to set it aside.
            name = self._tars.get(shard) or min(tars[shard])
            if name in tars[shard]:
                found[shard] = tars[shard].pop(name)
        return Listing(
            committed=found,
            orphans=tuple(sorted(name for names in tars.values() for name in names)),
            without_tar=tuple(sorted(sidecars - found.keys())),
        )

    def _names(self) -> tuple[set[int], dict[int, dict[str, int]]]:
        """Shards with a sidecar, and the tars of every shard with their bytes."""
        sidecars: set[int] = set()
        tars: dict[int, dict[str, int]] = defaultdict(dict)
        for name, size in self._objects.sizes().items():
            stem, _, kind = name.partition(".")
            if kind == "json" and SHARD_NAME.fullmatch(stem):
                sidecars.add(int(stem))
            elif TAR_NAME.fullmatch(name):
                tars[int(stem)][name] = size
        return sidecars, tars

    def _look_up(self, shards: list[int]) -> None:
        """Reads which tars some sidecars name."""
        for first in range(0, len(shards), SIDECARS_AT_ONCE):
            part = shards[first : first + SIDECARS_AT_ONCE]
            content = self._objects.read_all([sidecar_name(shard) for shard in part])
            for shard in part:
                self._tars[shard] = tar_named(shard, content.get(sidecar_name(shard), b""))

    def has(self, shard: int) -> bool:
        """Whether a shard is committed."""
        try:
            tar = tar_named(shard, self.sidecar(shard))
        except FileNotFoundError:
            return False
        return tar == "" or self._objects.exists(tar)

    def mark(self, shard: int) -> str:
        """The sha256 of the sidecar."""
        return hashlib.sha256(self.sidecar(shard)).hexdigest()

    def sidecar(self, shard: int) -> bytes:
        """The content of a sidecar."""
        return self._objects.read(sidecar_name(shard))

    def sidecars(self) -> Iterator[bytes]:
        """The content of every sidecar, by number."""
        shards = sorted(self._names()[0])
        for first in range(0, len(shards), SIDECARS_AT_ONCE):
            names = [sidecar_name(shard) for shard in shards[first : first + SIDECARS_AT_ONCE]]
            yield from self._objects.read_all(names).values()

    def read_tar(self, sidecar: Sidecar) -> bytes:
        """The tar: our copy, or a download that becomes one."""
        content = self._cache.read(sidecar)
        if content is not None:
            return content
        place = self.place(sidecar.shard)
        with self._cache.locked():
            content = self._cache.read(sidecar)  # another process may have had the lock before us
            if content is None:
                content = self._objects.read(sidecar.tar_name)
                sidecar.check_size(place, len(content))
                sidecar.check_sha256(place, hashlib.sha256(content).hexdigest())
                self._cache.add(sidecar, content)
        return content

    def verify(self, sidecar: Sidecar) -> None:
        """Downloads the tar piece by piece and keeps nothing of it."""
        place, digest = self.place(sidecar.shard), hashlib.sha256()
        sidecar.check_size(place, self._objects.size(sidecar.tar_name))
        for start in range(0, sidecar.num_bytes, PIECE_BYTES):
            end = min(start + PIECE_BYTES, sidecar.num_bytes)
            digest.update(self._objects.read(sidecar.tar_name, start, end))
        sidecar.check_sha256(place, digest.hexdigest())

    # ---------------------------------------------------------------------------------------
    # Publish

    @contextmanager
    def room_for(self, shard: int) -> Iterator[Path]:
        """A file in the system's temporary folder."""
        with tempfile.TemporaryDirectory(prefix="bowstring-") as folder:
            yield Path(folder) / f"{files.shard_name(shard)}.tar"

    def publish(self, sidecar: Sidecar, written: Path) -> Sidecar:
        """Uploads the tar, then the sidecar."""
        standing = self._standing(sidecar)
        if standing is not None:
            return standing
        named = replace(
            sidecar, tar=f"{files.shard_name(sidecar.shard)}.{uuid.uuid4().hex[:16]}.tar"
        )
        self._objects.upload(written, named.tar)
        try:
            self._objects.create(sidecar_name(named.shard), named.to_bytes())
        except OSError:
            # Another producer was faster; or an answer was lost, and what stands is our own.
            standing = self._standing(sidecar)
            if standing is None:
                raise
            if standing.tar_name != named.tar:
                self._objects.remove(named.tar)
            return standing
        return named

    def _standing(self, sidecar: Sidecar) -> Sidecar | None:
        """The committed sidecar in this shard's place. One that cannot be right is set aside."""
        shard, place = sidecar.shard, self.place(sidecar.shard)
        try:
            content = self.sidecar(shard)
        except FileNotFoundError:
            return None
        try:
            standing = Sidecar.parse(place, shard, content)
            standing.check_spec(place, sidecar.spec)
            standing.check_size(place, self._objects.size(standing.tar_name))
        except FileNotFoundError:
            self._set_aside(shard, content, "its tar is missing")
            return None
        except CorruptShard as error:
            self._set_aside(shard, content, str(error))
            return None
        return standing

    # ---------------------------------------------------------------------------------------
    # Take away

    def quarantine(self, shard: int, reason: str, seen: str) -> str | None:
        """The folder below `quarantine` in the store.

        There are no locks: of two readers that find the same shard bad at the same time, the slower
        one may in the worst case set a new and good one aside. It is made again, too.
        """
        try:
            content = self.sidecar(shard)
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest() != seen:
            return None
        return self._set_aside(shard, content, reason)

    def _set_aside(self, shard: int, sidecar: bytes, reason: str) -> str:
        """Copies first and deletes the sidecar next, so that nothing of it can be lost."""
        folder = f"quarantine/{files.shard_name(shard)}-{uuid.uuid4().hex[:8]}"
        text = json.dumps(records.tree_of(Reason(shard, reason)), indent=1) + "\n"
        self._objects.write(f"{folder}/{files.shard_name(shard)}.reason.json", text.encode())
        self._objects.write(f"{folder}/{sidecar_name(shard)}", sidecar)
        tar = tar_named(shard, sidecar)
        if tar and self._objects.exists(tar):
            self._objects.copy(tar, f"{folder}/{tar}")
        self._objects.remove(sidecar_name(shard))
        if tar:
            self._objects.remove(tar)
        return f"{self.root.rstrip('/')}/{folder}"

    def reasons(self) -> dict[str, bytes]:
        """Those in the store, and those of requests in the run's own folder."""
        found = local.local_reasons(self._run)
        for folder in self._objects.folders("quarantine"):
            path = f"quarantine/{folder}"
            for name in self._objects.sizes(path):
                if name.endswith(".reason.json"):
                    found[folder] = self._objects.read(f"{path}/{name}")
        return dict(sorted(found.items()))

    def delete_tars(self, shards: Iterable[int]) -> None:
        """Deletes every tar of these shards, those that no sidecar names included."""
        tars = self._names()[1]
        for shard in shards:
            for name in tars.get(shard, {}):
                self._objects.remove(name)

    def clear(self) -> list[str]:
        """Removes the tars that no sidecar has named for an hour."""
        old = time.time() - files.STALE_S
        orphans = self.listing().orphans
        removed = [name for name in orphans if self._objects.modified(name).timestamp() < old]
        for name in removed:
            self._objects.remove(name)
        return removed


def sidecar_name(shard: int) -> str:
    """Name of a sidecar."""
    return f"{files.shard_name(shard)}.json"


def tar_named(shard: int, sidecar: bytes) -> str:
    """The tar that a sidecar names; "" when the sidecar is damaged."""
    try:
        return Sidecar.parse("", shard, sidecar).tar_name
    except CorruptShard:
        return ""


# -----------------------------------------------------------------------------------------------
# Copies on the disk of the machine that reads them


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
        files.write_atomic(self._path(sidecar), content)
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
