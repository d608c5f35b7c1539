"""Real images by name: scikit-learn's digits, Fashion-MNIST's files, any set as one npz."""

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from distill.config import ConfigError, check
from distill.data.config import DataConfig
from distill.flow.noise import permutation, sample_noise, uniform
from distill.flow.trajectory import TrajectoryBatch

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_COUNT = 60_000  # training images
NO_IMAGES = (
    "data.name=latents has no images to train a teacher on; take one from elsewhere "
    "(teacher=sit, teacher=diffusers or teacher=native, with its path)"
)


def load_images(data: DataConfig) -> tuple[Float[Tensor, "N C H W"], Int[Tensor, "N"]]:
    """All training images in [-1, 1], and their classes (-1 when data.num_classes is 0).

    Raises:
        ConfigError: files absent, cut or of another kind; settings that do not describe the images.
    """
    check_files(data)
    match data.name:
        case "digits":
            images, labels = _digits()
        case "fashion":
            images, labels = _fashion(*_fashion_files(data))
        case "npz":
            images, labels = _npz(Path(data.path))
        case "latents":
            raise ConfigError(NO_IMAGES)
        case _:
            raise ConfigError(f"data.name={data.name} is not known")
    channels, size = images.shape[1], images.shape[2]
    check(
        data.channels == channels, f"data.channels={data.channels}, but {data.name} has {channels}"
    )
    padding = data.size - size
    check(
        padding >= 0 and padding % 2 == 0,
        f"data.size={data.size} must be {size}, the size of {data.name}, or an even number more",
    )
    images = F.pad(images, [padding // 2] * 4, value=-1.0)
    if data.num_classes == 0:
        return images, torch.full_like(labels, -1)
    classes = int(labels.max()) + 1
    check(
        data.num_classes == classes,
        f"data.num_classes={data.num_classes} must be 0 or {classes} for {data.name}",
    )
    return images, labels


def check_files(data: DataConfig) -> None:
    """Raises ConfigError when a file of the data set is absent, so that it is known early."""
    if data.name == "npz" and not Path(data.path).is_file():
        raise ConfigError(
            f"data.path={data.path} is no file; set it to an .npz with `images`, uint8 "
            "[N, H, H, C], and `labels`, integers [N] (docs/operations.md)"
        )
    for path in _fashion_files(data) if data.name == "fashion" else []:
        if not path.exists():
            raise ConfigError(
                f"{path} is not there. On Debian and Ubuntu: apt-get install "
                "dataset-fashion-mnist. Elsewhere set data.path to a folder with the *-ubyte.gz "
                "files of Fashion-MNIST"
            )


def _npz(path: Path) -> tuple[Tensor, Tensor]:
    """The images of a file, and its labels; without `labels` all are of class 0."""
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
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(), torch.from_numpy(labels.astype(np.int64))


def _digits() -> tuple[Tensor, Tensor]:
    """1,797 scans of handwritten digits, 8x8, values 0 .. 16."""
    from sklearn.datasets import (
        load_digits,
    )  # as long to import as torch; ranks of a student do not

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(digits.target).long()


def _fashion_files(data: DataConfig) -> list[Path]:
    """Where the training images and their labels should be."""
    folder = Path(data.path) if data.path else FASHION_FOLDER
    return [folder / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]


def _fashion(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """60,000 pictures of clothes, 28x28 (Xiao et al., 2017)."""
    pixels = torch.from_numpy(_read_idx(images, (FASHION_COUNT, 28, 28)))
    classes = torch.from_numpy(_read_idx(labels, (FASHION_COUNT,)))
    return pixels[:, None].float() / 127.5 - 1, classes.long()


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
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
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape).copy()


# Noise of the images' stream starts here, so that no trajectory of the same seed starts from noise
# that its teacher was trained on.
FIRST_NOISE = 1 << 40


class ImageStream:
    """An endless stream over real images. Its position is the global step, nothing else.

    Every epoch shows each image once, shuffled by (seed, epoch). Rank r of W takes the entries with
    index = r mod W of each global batch, so the sequence does not depend on W.
    """

    def __init__(
        self,
        images: Float[Tensor, "N C H W"],
        labels: Int[Tensor, "N"],
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        label_dropout: float,
    ) -> None:
        """`batch_size` is global; a label becomes -1 with chance `label_dropout`."""
        assert batch_size % world_size == 0
        self._images, self._labels = images, labels
        self._seed, self._batch_size = seed, batch_size
        self._rank, self._world_size = rank, world_size
        self._label_dropout = label_dropout
        self._epochs: dict[int, np.ndarray] = {}

    def read(self, step: int) -> TrajectoryBatch:
        """This rank's part of global batch `step`: state 0 is noise, state 1 a real image."""
        positions = np.arange(self._rank, self._batch_size, self._world_size)
        ids = step * self._batch_size + positions
        chosen = torch.from_numpy(self._image_of(ids))
        shape = tuple(self._images.shape[1:])
        noise = torch.from_numpy(sample_noise(self._seed, ids + FIRST_NOISE, shape))
        draws = uniform(self._seed, "label_dropout", step, self._batch_size)[positions]
        dropped = draws < self._label_dropout
        labels = self._labels[chosen].masked_fill(torch.from_numpy(dropped), -1)
        return TrajectoryBatch(
            states=torch.stack([noise, self._images[chosen]], dim=1)[:, None],
            times=torch.tensor([0.0, 1.0]),
            weights=torch.ones(1),
            labels=labels,
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            global_size=self._batch_size,
        )

    def _image_of(self, ids: np.ndarray) -> np.ndarray:
        """The image that entry `ids` of the endless sequence shows."""
        count = len(self._images)
        epochs, places = np.divmod(ids, count)
        needed = np.unique(epochs).tolist()
        for epoch in [known for known in self._epochs if known not in needed]:
            del self._epochs[epoch]
        chosen = np.empty_like(ids)
        for epoch in needed:
            if epoch not in self._epochs:
                self._epochs[epoch] = permutation(self._seed, "epoch", epoch, count)
            here = epochs == epoch
            chosen[here] = self._epochs[epoch][places[here]]
        return chosen
