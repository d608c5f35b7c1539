"""Real images that lie in files: read and decoded when they are asked for, never all in memory.

What a data set's own labels mean in a run's `data.num_classes`, and what happens to images of
another mode or to broken ones, is decided here, once, and said in `notes`. No torch.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from distill.config import check
from distill.datasets import config, manifest, pictures, sets

PLAIN = {1: "L", 3: "RGB"}  # the mode that needs no conversion


class ImageFiles:
    """The images of a data set that a run uses, with its classes.

    Attributes:
        labels: class of each, -1 when data.num_classes is 0.
        notes: sentences about what was read, converted and left out.
        sha256: of all their bytes, hexadecimal.
    """

    def __init__(self, data: config.DataConfig, say: Callable[[str], None]) -> None:
        """Makes the manifest if it is not there, which `say` tells.

        Raises:
            ConfigError: settings that do not describe the images; images that they refuse.
        """
        check(
            bool(data.path),
            f"data.path is empty; set it to the images of data.name={data.name}: a folder, a .zip, "
            ".tar, .parquet or .npz files (docs/operations.md)",
        )
        check(
            data.channels in PLAIN,
            f"data.channels={data.channels}: images in files are read as grey, 1, or RGB, 3",
        )
        path = Path(data.path)
        folder = Path(data.manifest or f"{data.path.rstrip('/')}.manifest")
        self._data = data
        self._manifest = manifest.open_manifest(path, folder, say)
        about = self._manifest.about
        self.notes = [f"{data.path}: {about.num_images:,} images", *about.notes]
        self._kept = self._select()
        self.labels = self._classes()
        self.sha256 = about.entries_sha256
        expected = sets.SETS[data.name].num_images
        if expected and about.num_images != expected:
            self.notes.append(f"{data.name} has {expected:,} images, here are {about.num_images:,}")

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, indices: Int64[np.ndarray, "B"]) -> UInt8[np.ndarray, "B C H W"]:
        """Pixels of some images, 0 .. 255.

        Raises:
            ConfigError: a file is no longer what it was.
        """
        data = self._data
        out = np.empty((len(indices), data.channels, data.size, data.size), np.uint8)
        for row, index in enumerate(self._kept[indices].tolist()):
            picture = self._open(self._manifest.read(index))
            out[row] = pictures.pixels_of(picture, data.channels, data.size, data.crop)
        return out

    def _open(self, content: bytes) -> Image.Image:
        about = self._manifest.about
        if not about.shape:
            return pictures.open_picture(content)
        array = np.frombuffer(content, np.uint8).reshape(about.shape)
        array = array.transpose(1, 2, 0) if about.planes else array
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)

    def _select(self) -> Int64[np.ndarray, "N"]:
        """The images that are used, by their numbers in the manifest."""
        data, found = self._data, self._manifest
        names, about = np.array(found.mode_names), found.about
        of_image = names[found.modes]
        is_broken = of_image == manifest.BROKEN
        if is_broken.any():
            listed = "; ".join(f"{place}: {why}" for place, why in list(about.broken.items())[:3])
            said = f"{int(is_broken.sum()):,} of {len(names[found.modes]):,} images are broken"
            check(
                data.broken == "skip",
                f"{data.path}: {said} ({listed}); set data.broken=skip to leave them out",
            )
            self.notes.append(f"{said} and left out: {listed}")
        is_odd = ~is_broken & (of_image != PLAIN[data.channels])
        if is_odd.any():
            modes = {mode: n for mode, n in about.modes.items() if mode in set(of_image[is_odd])}
            counts = ", ".join(f"{count:,} {mode}" for mode, count in modes.items())
            said = f"{int(is_odd.sum()):,} images are not {PLAIN[data.channels]} ({counts})"
            check(
                data.other_modes != "refuse",
                f"{data.path}: {said}; set data.other_modes=convert, or skip to leave them out",
            )
            done = "converted" if data.other_modes == "convert" else "left out"
            self.notes.append(f"{said} and {done}")
        kept = ~is_broken & ~(is_odd if data.other_modes == "skip" else False)
        check(bool(kept.any()), f"{data.path}: no image is left after data.other_modes and broken")
        chosen = np.flatnonzero(kept)
        self._check_sizes(found.sizes[chosen])
        return chosen

    def _check_sizes(self, sizes: np.ndarray) -> None:
        """Raises ConfigError unless every image becomes data.size by its crop."""
        data = self._data
        kinds, counts = np.unique(sizes, axis=0, return_counts=True)
        (width, height), rest = kinds[counts.argmax()].tolist(), len(sizes) - int(counts.max())
        if data.crop == "none":
            fits = ((data.size - sizes >= 0) & ((data.size - sizes) % 2 == 0)).all()
            check(
                rest == 0 and bool(fits) and width == height,
                f"data.size={data.size} with data.crop=none must be the size of the images, or an "
                f"even number more; {data.path} has {width}x{height}"
                + (f" and {rest:,} of another size" if rest else "")
                + "; set data.crop=adm to crop and resize them",
            )
            return
        least = pictures.CELEBA_PIXELS if data.crop == "celeba" else 1
        check(
            int(sizes.min()) >= least,
            f"data.crop=celeba takes the middle {least}x{least}, and {data.path} has an image of "
            f"{int(sizes.min())} pixels; set data.crop=adm",
        )
        small = int((sizes.min(axis=1) < data.size).sum())
        if small:
            self.notes.append(f"{small:,} images are smaller than data.size={data.size}, enlarged")

    # -------------------------------------------------------------------------------------------
    # Classes

    def _classes(self) -> Int64[np.ndarray, "N"]:
        """The class of each image in 0 .. data.num_classes - 1; -1 without classes."""
        data, about = self._data, self._manifest.about
        if data.num_classes == 0:
            return np.full(len(self._kept), -1, np.int64)
        check(
            about.has_labels,
            f"data.num_classes={data.num_classes}, but the images of {data.path} have no classes; "
            "set data.num_classes=0",
        )
        labels = self._manifest.labels[self._kept]
        if about.kind == "pictures":
            labels = self._of_folders(labels)
        else:
            labels = labels - self._first_label(labels)
        empty = data.num_classes - len(np.unique(labels))
        if empty:
            self.notes.append(f"{empty} of {data.num_classes} classes have no image")
        return labels.astype(np.int64)

    def _of_folders(self, labels: np.ndarray) -> np.ndarray:
        """Classes by the folders' names: their place in the order, or the number that they are."""
        data, classes = self._data, self._manifest.about.classes
        if len(classes) == data.num_classes:
            return labels
        numbers = [int(name) if name.isdecimal() else -1 for name in classes]
        check(
            min(numbers) >= 0 and max(numbers) <= data.num_classes,
            f"data.num_classes={data.num_classes}, but {data.path} has {len(classes)} class "
            f"folders ({classes[0]} .. {classes[-1]}); set data.num_classes={len(classes)}, or 0",
        )
        labels = np.array(numbers)[labels]
        return labels - self._first_label(labels)

    def _first_label(self, labels: np.ndarray) -> int:
        """The label of the first class: data.first_label, or what the labels can only mean.

        Raises:
            ConfigError: labels outside of data.num_classes, or that can mean two things.
        """
        data, about = self._data, self._manifest.about
        low, high, count = int(labels.min()), int(labels.max()), data.num_classes
        there = f"{data.path}: labels are {low} .. {high}"
        first = data.first_label
        if first < 0:
            from_one = low >= 1 and (high == count or (about.counts_from_one and high <= count))
            is_unclear = low == 1 and high == count - 1 and not about.counts_from_one
            check(
                not is_unclear,
                f"{there} with data.num_classes={count}: if they count from 1, set "
                f"data.num_classes={high}; if class 0 has no image here, set data.first_label=0",
            )
            first = int(from_one)
            if from_one:
                self.notes.append(f"{there} and count from 1: 1 is taken off")
        check(
            first <= low and high - first < count,
            f"{there}, data.num_classes={count} has {first} .. {count + first - 1}; set "
            f"data.num_classes={high - first + 1}, or 0 for none"
            + ("" if first <= low else f", or data.first_label={low}"),
        )
        return first
