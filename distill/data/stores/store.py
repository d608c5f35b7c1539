"""Where the shards of a run lie, and all that is done to them there.

A run names a folder (`distill.data.stores.local`) or a URL of an object store
(`distill.data.stores.bucket`). In both a shard is committed by its sidecar, which is put last and
never replaces another one. The functions below are what the rest of Bowstring uses.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from distill.data.sidecar import Listing, Sidecar
from distill.data.stores.local import LocalStore
from distill.run.files import RunDir


@runtime_checkable
class ShardStore(Protocol):
    """A place for shards. Any process that can reach it may call any method at any time.

    All methods raise OSError when the place cannot be reached, read or written.
    """

    @property
    def pause_s(self) -> float:
        """Seconds that a reader should let pass, at least, before it looks for a shard again."""

    @property
    def root(self) -> str:
        """The place in words, for messages."""

    def place(self, shard: int) -> str:
        """A shard's place in words, for messages."""

    def listing(self) -> Listing:
        """Everything that lies there. Of a shard that is new here the sidecar may be read too."""

    def has(self, shard: int) -> bool:
        """Whether a shard is committed."""

    def mark(self, shard: int) -> str:
        """A word that tells this commit of a shard from a later one; FileNotFoundError if none."""

    def sidecar(self, shard: int) -> bytes:
        """The content of a sidecar; FileNotFoundError if there is none."""

    def sidecars(self) -> Iterator[bytes]:
        """The content of every sidecar by number, those of evicted shards included."""

    def read_tar(self, sidecar: Sidecar) -> bytes:
        """The tar that a sidecar means, after size and sha256 were checked.

        Raises:
            FileNotFoundError: it is not there.
            CorruptShard: a byte differs.
        """

    def verify(self, sidecar: Sidecar) -> None:
        """Checks every byte of the tar where it lies; raises as `read_tar`."""

    def room_for(self, shard: int) -> AbstractContextManager[Path]:
        """A path that a tar can be written to before it is published; it is gone at the end."""

    def publish(self, sidecar: Sidecar, written: Path) -> Sidecar:
        """The sidecar that stands after committing the tar in `written`: ours, or an earlier one's.

        Raises:
            ForeignShard: the place is taken by a shard of another run.
        """

    def quarantine(self, shard: int, reason: str, seen: str) -> str | None:
        """The place that took a bad shard, which is then to be made again.

        `seen` is the `mark` of the commit that was found bad. None when another reader has set that
        one aside already.
        """

    def reasons(self) -> dict[str, bytes]:
        """The reason.json of everything in quarantine, by folder."""

    def delete_tars(self, shards: Iterable[int]) -> None:
        """Deletes tars and leaves their sidecars."""

    def clear(self) -> list[str]:
        """Names of what killed producers left in the making, after it was removed."""


@cache
def open_store(run: RunDir) -> ShardStore:
    """The store of a run.

    Raises:
        ConfigError: the package for such a URL is missing.
    """
    if "://" not in run.location:
        return LocalStore(run)
    from distill.data.stores.bucket import ObjectStore  # a local run needs no fsspec

    return ObjectStore(run)


def committed(run: RunDir) -> dict[int, int]:
    """Bytes of the tar of every committed shard, by number. Opens no tar."""
    return open_store(run).listing().committed


def is_committed(run: RunDir, shard: int) -> bool:
    """Whether a shard is committed."""
    return open_store(run).has(shard)


def read_sidecar(run: RunDir, shard: int) -> Sidecar:
    """The sidecar of a committed shard.

    Raises:
        FileNotFoundError: there is none.
        CorruptShard: it is not what was written.
    """
    store = open_store(run)
    return Sidecar.parse(store.place(shard), shard, store.sidecar(shard))


def verify_shard(run: RunDir, shard: int) -> Sidecar:
    """The sidecar of a shard after every byte of it and of its tar was checked.

    Raises:
        FileNotFoundError: the shard is not there.
        CorruptShard: a byte differs.
    """
    sidecar = read_sidecar(run, shard)
    open_store(run).verify(sidecar)
    return sidecar
