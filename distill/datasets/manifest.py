"""The manifest of a data set: each image's place, class, mode, size and sha256, made once.

It is a folder beside the images, `data.path` and `.manifest`, or `data.manifest`: `manifest.json`,
`entries.npz`, and `copied.bin` where the images lie packed in a way that gives no access to one of
them (docs/formats.md). Making it reads and decodes every image, once; whatever is broken or of
another mode is known before a training begins. No torch.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.config import ConfigError, check
from distill.datasets import listing, pictures
from distill.run import files, records

FORMAT = 1
ABOUT, ENTRIES, COPIED = "manifest.json", "entries.npz", "copied.bin"
BROKEN = ""  # the mode of what cannot be decoded
NAMED = 20  # broken files that are named with their reason
CHUNK = 256  # images a thread looks at in a row


@dataclass(frozen=True)
class About:
    """The content of manifest.json.

    Attributes:
        format: of this folder.
        kind: what the files are, a key of `listing.LISTERS`.
        num_images: entries, broken ones too.
        classes: their names, or empty.
        has_labels: whether every image has a class.
        counts_from_one: the format is known to number classes from 1.
        shape: of raw pixels; empty: each image is a picture, encoded.
        planes: whether raw pixels are [C, H, W].
        modes: images by Pillow's mode; "" are the broken ones.
        sizes: images by "WIDTHxHEIGHT", the most frequent ones.
        broken: some of the broken files, each with its reason.
        notes: sentences about what was chosen.
        files_sha256: of the names of the files (`listing.Survey`).
        entries_sha256: of entries.npz, and so of every image.
    """

    format: int
    kind: str
    num_images: int
    classes: tuple[str, ...]
    has_labels: bool
    counts_from_one: bool
    shape: tuple[int, ...]
    planes: bool
    modes: dict[str, int]
    sizes: dict[str, int]
    broken: dict[str, str]
    notes: tuple[str, ...]
    files_sha256: str
    entries_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A manifest, and access to the bytes of every image.

    Attributes:
        root: what the names in `files` are relative to.
        folder: where the manifest lies.
        about: what it says of the whole.
        files: names, bytes [F]; an empty one is `copied.bin`.
        places: (file, offset, bytes) of each image, int64 [N, 3].
        labels: as the files say, int64 [N]; -1 without.
        modes: index into `about.modes`, uint8 [N].
        sizes: width and height, int32 [N, 2].
        sha256: of each image's bytes, uint8 [N, 32].
    """

    root: Path
    folder: Path
    about: About
    files: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    modes: np.ndarray
    sizes: np.ndarray
    sha256: np.ndarray

    @cached_property
    def mode_names(self) -> list[str]:
        """Pillow's modes, "" for broken, by the numbers in `modes`."""
        return list(self.about.modes)

    def place(self, index: int) -> str:
        """An image's name for messages."""
        file, offset, _ = self.places[index].tolist()
        path = self._path(file)
        return f"{path}, byte {offset}" if self.about.kind != "pictures" else str(path)

    def read(self, index: int) -> bytes:
        """The bytes of an image.

        Raises:
            ConfigError: they are no longer those that the manifest was made of.
        """
        file, offset, length = self.places[index].tolist()
        content = read_at(self._path(file), offset, length)
        if hashlib.sha256(content).digest() != self.sha256[index].tobytes():
            raise ConfigError(
                f"{self.place(index)} has changed since the manifest {self.folder} was made; "
                "delete that folder to have it made again"
            )
        return content

    def _path(self, file: int) -> Path:
        name = os.fsdecode(bytes(self.files[file]))
        return self.root / name if name != listing.COPY else self.folder / COPIED


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Some bytes of a file; fewer where it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


# -----------------------------------------------------------------------------------------------
# Open, or make


def open_manifest(path: Path, folder: Path, say: Callable[[str], None]) -> Manifest:
    """The manifest of the images at `path`, which lies in `folder`; made if it is not there.

    Raises:
        ConfigError: no images, or other files than when it was made; it cannot be written.
    """
    found = listing.survey(path)
    if not (folder / ABOUT).is_file():
        try:
            make_manifest(found, folder, say)
        except OSError as error:  # those of reading are sentences already
            raise ConfigError(
                f"the manifest of {path} cannot be written ({error}); set data.manifest to a place "
                "that can be, and that every node sees"
            ) from error
    try:
        about = records.read_record(About, folder / ABOUT)
        content = (folder / ENTRIES).read_bytes()
    except (OSError, records.RecordError) as error:
        raise ConfigError(f"{error}; delete {folder} to have it made again") from error
    check(
        hashlib.sha256(content).hexdigest() == about.entries_sha256 and about.format == FORMAT,
        f"{folder / ENTRIES} is damaged; delete {folder} to have it made again",
    )
    check(
        about.files_sha256 == found.sha256,
        f"data.path={path} has not the files of which {folder} was made, {about.num_images:,} "
        "images; put them back, or delete that folder to have it made again",
    )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Manifest(root=found.root, folder=folder, about=about, **arrays)


def make_manifest(found: listing.Survey, folder: Path, say: Callable[[str], None]) -> None:
    """Writes a manifest: every image is read, decoded and hashed, by as many threads as cores."""
    with files.replaced(folder) as temporary:
        with (temporary / COPIED).open("wb") as spool:
            listed = listing.list_images(found, spool)
        count = len(listed.places)
        say(f"{found.root}: reads {count:,} images once, for {folder.name}")
        names = np.array([os.fsencode(name) for name in listed.files])
        empty = np.zeros(0)
        draft = Manifest(
            found.root, temporary, _about(found, listed, {}, {}, {}, ""), names,
            np.array(listed.places, np.int64), empty, empty, empty, empty,
        )  # fmt: skip
        seen, sha256, broken = _look(draft, listed)
        by_mode = Counter(one.mode for one in seen)
        modes = dict(by_mode.most_common())
        sizes = Counter(f"{one.width}x{one.height}" for one in seen if one.mode != BROKEN)
        number = {mode: index for index, mode in enumerate(modes)}
        content = io.BytesIO()
        np.savez(
            content,
            files=names,
            places=draft.places,
            labels=np.array(listed.labels or [-1] * count, np.int64),
            modes=np.array([number[one.mode] for one in seen], np.uint8),
            sizes=np.array([(one.width, one.height) for one in seen], np.int32),
            sha256=sha256,
        )
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        most = dict(sizes.most_common(NAMED))
        about = _about(found, listed, modes, most, broken, digest)
        if not (temporary / COPIED).stat().st_size:
            (temporary / COPIED).unlink()
        (temporary / ENTRIES).write_bytes(content.getvalue())
        files.write_json(temporary / ABOUT, records.tree_of(about))


def _about(
    found: listing.Survey,
    listed: listing.Listing,
    modes: dict[str, int],
    sizes: dict[str, int],
    broken: dict[str, str],
    entries_sha256: str,
) -> About:
    return About(
        format=FORMAT,
        kind=found.kind,
        num_images=len(listed.places),
        classes=listed.classes,
        has_labels=len(listed.labels) == len(listed.places) and -1 not in listed.labels,
        counts_from_one=listed.counts_from_one,
        shape=listed.shape,
        planes=listed.planes,
        modes=modes,
        sizes=sizes,
        broken=broken,
        notes=tuple(listed.notes),
        files_sha256=found.sha256,
        entries_sha256=entries_sha256,
    )


def _look(
    draft: Manifest, listed: listing.Listing
) -> tuple[list[pictures.Seen], np.ndarray, dict[str, str]]:
    """What each image is, the sha256 of its bytes, and why some are broken."""
    count = len(listed.places)
    sha256, broken = np.empty((count, 32), np.uint8), dict[int, str]()
    raw = raw_seen(listed.shape, listed.planes) if listed.shape else None

    def look(part: range) -> list[pictures.Seen]:
        seen = []
        for index in part:
            file, offset, length = listed.places[index]
            content = read_at(draft._path(file), offset, length)
            sha256[index] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
            try:
                if raw and len(content) != length:
                    raise pictures.BrokenPicture("the file ends before it does")
                seen.append(raw or pictures.look(content))
            except pictures.BrokenPicture as error:
                seen.append(pictures.Seen(BROKEN, 0, 0))
                broken[index] = str(error)
        return seen

    parts = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and hashlib let others run meanwhile
        seen = [one for part in pool.map(look, parts) for one in part]
    return seen, sha256, {draft.place(i): broken[i] for i in sorted(broken)[:NAMED]}


def raw_seen(shape: tuple[int, ...], planes: bool) -> pictures.Seen:
    """What raw pixels of a shape are."""
    channels, height, width = shape if planes else (shape[2], *shape[:2])
    return pictures.Seen({1: "L", 3: "RGB", 4: "RGBA"}[channels], width, height)
