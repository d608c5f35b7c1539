"""Named bytes below a URL: a thin layer over fsspec and its only importer.

Credentials and end points come from the environment, as fsspec and its file systems read them.
What other machines wrote is seen at once: nothing is listed from memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import fsspec

from distill.config import ConfigError

try:  # what s3fs lets through when a server cannot be reached or no credentials are found
    from botocore.exceptions import BotoCoreError
except ImportError:
    BotoCoreError = TimeoutError


class Objects:
    """The objects below a URL, by their names relative to it. Every method raises OSError with the
    URL when the store refuses or cannot be reached.
    """

    def __init__(self, url: str) -> None:
        """Raises ConfigError when the package for such a URL is missing."""
        self.url = url
        try:
            self._fs, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"trajectory.location={url} cannot be opened: {error}; for S3 "
                "pip install 'bowstring[s3]'"
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except BotoCoreError as error:
            raise OSError(f"trajectory.location={self.url}: {error}") from error

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every object right below `folder`, by name without it. All pages are read."""
        with self._reaching():
            try:
                entries = self._fs.ls(self._path(folder).rstrip("/"), detail=True)
            except FileNotFoundError:  # nothing was put there yet
                return {}
        return {
            entry["name"].rpartition("/")[2]: entry["size"]
            for entry in entries
            if entry["type"] == "file"
        }

    def folders(self, folder: str) -> list[str]:
        """Names of the folders right below `folder`, in order."""
        with self._reaching():
            try:
                entries = self._fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
        names = (e["name"].rstrip("/") for e in entries if e["type"] == "directory")
        return sorted(name.rpartition("/")[2] for name in names)

    def exists(self, name: str) -> bool:
        """Whether an object is there."""
        with self._reaching():
            return bool(self._fs.exists(self._path(name)))

    def size(self, name: str) -> int:
        """Bytes of an object; FileNotFoundError if there is none."""
        with self._reaching():
            return int(self._fs.size(self._path(name)))

    def modified(self, name: str) -> datetime:
        """When an object was written, by the clock of the store."""
        with self._reaching():
            when = self._fs.modified(self._path(name))
            assert isinstance(when, datetime)
            return when

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes start .. end - 1 of an object; FileNotFoundError if there is none."""
        with self._reaching():
            return bytes(self._fs.cat_file(self._path(name), start=start, end=end))

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """The content of several objects, read at the same time; those that are gone are left out.

        Raises:
            OSError: one could not be read, though it is there.
        """
        with self._reaching():
            found = self._fs.cat([self._path(name) for name in names], on_error="return")
        content = {}
        for name in names:
            value = found[self._path(name)]
            if isinstance(value, bytes):
                content[name] = value
            elif not isinstance(value, FileNotFoundError):
                raise OSError(f"trajectory.location={self.url}: {value}") from value
        return content

    def write(self, name: str, content: bytes) -> None:
        """Puts an object, in place of any other."""
        with self._reaching():
            self._fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> None:
        """Puts an object unless there is one. On S3 that is one step (If-None-Match).

        Raises:
            OSError: there is one, mostly as FileExistsError; or the answer was lost.
        """
        with self._reaching():
            self._fs.pipe_file(self._path(name), content, mode="create")

    def upload(self, path: Path, name: str) -> None:
        """Puts a local file."""
        with self._reaching():
            self._fs.put_file(str(path), self._path(name))

    def copy(self, source: str, name: str) -> None:
        """Copies an object within the store."""
        with self._reaching():
            self._fs.cp_file(self._path(source), self._path(name))

    def remove(self, name: str) -> None:
        """Deletes an object if it is there."""
        with self._reaching():
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return
