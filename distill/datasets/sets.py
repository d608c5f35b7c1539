"""Data sets by name: which files each needs, and how its images are read. No torch.

A new one is a row of `SETS` and configs/data/NAME.yaml. What `data.path` may hold is the same for
all that lie in files (`distill.datasets.listing`); a small set of another kind has a function here.
"""

import gzip
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
    "(teacher=sit, teacher=diffusers or teacher=native, with its path), or set data.path to "
    "a folder that `bowstring encode` wrote"
)


@dataclass(frozen=True)
class ImageSet:
    """A data set.

    Attributes:
        load: reads all images for a `data.path`; raises ConfigError for files that are cut or of
            another kind. None: they are read when they are asked for (`distill.datasets.files`).
        check: raises ConfigError when a file is absent, so that it is known early.
        has_images: whether a teacher can be trained on it, and a student compared with it.
        num_images: that the whole set has; 0: any number.
    """

    load: Callable[[str], Labelled] | None = None
    check: Callable[[str], None] = lambda path: None
    has_images: bool = True
    num_images: int = 0


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


def latents(path: str) -> Labelled:
    """None: the run's teacher comes from elsewhere, and only distances to it are taken."""
    raise ConfigError(NO_IMAGES)


SETS = {
    "digits": ImageSet(digits),
    "fashion": ImageSet(fashion, _check_fashion),
    "folder": ImageSet(),
    "npz": ImageSet(),
    "cifar10": ImageSet(num_images=50_000),
    "celeba": ImageSet(num_images=202_599),
    "ffhq64": ImageSet(num_images=70_000),
    "imagenet64": ImageSet(num_images=1_281_167),
    "imagenet256": ImageSet(num_images=1_281_167),
    "latents": ImageSet(latents, has_images=False),
}
