"""Data sets by name: which files each needs, and how its images are read. No torch.

A new one is a function here, a row of `SETS`, and configs/data/NAME.yaml.
"""

import gzip
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.config import ConfigError, check

# Images float32 [N, C, H, H] in [-1, 1], and their classes int64 [N], from 0 on
Labelled = tuple[np.typing.NDArray[np.float32], np.typing.NDArray[np.int64]]

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_COUNT = 60_000  # training images
NO_IMAGES = (
    "data.name=latents has no images to train a teacher on; take one from elsewhere "
    "(teacher=sit, teacher=diffusers or teacher=native, with its path)"
)


@dataclass(frozen=True)
class ImageSet:
    """A data set.

    Attributes:
        load: reads all images for a `data.path`; raises ConfigError for files that are cut or of
            another kind.
        check: raises ConfigError when a file is absent, so that it is known early.
        has_images: whether a teacher can be trained on it, and a student compared with it.
    """

    load: Callable[[str], Labelled]
    check: Callable[[str], None] = lambda path: None
    has_images: bool = True


def digits(path: str) -> Labelled:
    """1,797 scans of handwritten digits, 8x8, values 0 .. 16. They come with scikit-learn."""
    from sklearn.datasets import load_digits  # long to import; ranks of a student do without

    found = load_digits()
    return found.images.astype(np.float32)[:, None] / 8 - 1, found.target.astype(np.int64)


def fashion(path: str) -> Labelled:
    """60,000 pictures of clothes, 28x28 (Xiao et al., 2017)."""
    images, labels = fashion_files(path)
    pixels = _read_idx(images, (FASHION_COUNT, 28, 28))[:, None]
    classes = _read_idx(labels, (FASHION_COUNT,))
    return pixels.astype(np.float32) / np.float32(127.5) - 1, classes.astype(np.int64)


def fashion_files(path: str) -> list[Path]:
    """Where the training images and their labels should be."""
    folder = Path(path) if path else FASHION_FOLDER
    return [folder / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]


def _check_fashion(path: str) -> None:
    for file in fashion_files(path):
        check(
            file.exists(),
            f"{file} is not there. On Debian and Ubuntu: apt-get install dataset-fashion-mnist. "
            "Elsewhere set data.path to a folder with the *-ubyte.gz files of Fashion-MNIST",
        )


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.typing.NDArray[np.uint8]:
    """The bytes of a gzipped idx file as uint8 of `shape`.

    An idx header is 0, 0, type 8, number of axes, then each length as big-endian uint32.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); it is cut or damaged, fetch it again"
        ) from error
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, dtype=">u4").tobytes()
    expected = len(header) + int(np.prod(shape))
    if content[: len(header)] != header or len(content) != expected:
        raise ConfigError(
            f"{path} is not an idx file of {' x '.join(map(str, shape))} bytes "
            f"({len(content)} bytes, expected {expected}); fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def npz(path: str) -> Labelled:
    """The images of a file of the user's; without `labels` all are of class 0."""
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no zip file, or cut")
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
            labels = file["labels"] if "labels" in file.files else np.zeros(len(images), np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read as an .npz with `images` ({error})") from error
    is_square = images.ndim == 4 and images.size > 0 and images.shape[1] == images.shape[2]
    is_labelled = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not (images.dtype == np.uint8 and is_square and is_labelled and labels.min() >= 0):
        raise ConfigError(
            f"{path}: `images` must be uint8 [N, H, H, C] and `labels` integers [N] from 0 on; "
            f"they are {images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    return pixels, labels.astype(np.int64)


def _check_npz(path: str) -> None:
    check(
        Path(path).is_file(),
        f"data.path={path} is no file; set it to an .npz with `images`, uint8 [N, H, H, C], and "
        "`labels`, integers [N] (docs/operations.md)",
    )


def latents(path: str) -> Labelled:
    """None: the run's teacher comes from elsewhere, and only distances to it are taken."""
    raise ConfigError(NO_IMAGES)


SETS = {
    "digits": ImageSet(digits),
    "fashion": ImageSet(fashion, _check_fashion),
    "npz": ImageSet(npz, _check_npz),
    "latents": ImageSet(latents, has_images=False),
}
