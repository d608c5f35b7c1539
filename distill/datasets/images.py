"""Batches of real images, for the training of a teacher and as the reference of an evaluation."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch.utils.data import DataLoader, Dataset

from distill.config import check
from distill.datasets import config, files, latents, sets
from distill.flow.noise import permutation, sample_noise, uniform
from distill.flow.trajectory import TrajectoryBatch

REFERENCE_BATCH = 100  # images of an evaluation that are decoded at once


@runtime_checkable  # beartype asks
class Images(Protocol):
    """Real images of a run: [0, 255] in bytes, or values in [-1, 1], read by their numbers.

    Attributes:
        labels: class of each, int64 [N]; -1 when data.num_classes is 0.
        notes: sentences about what was read, converted and left out.
    """

    labels: np.ndarray
    notes: list[str]

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Some of them, uint8 or float32 [B, C, H, W]."""


class InMemory:
    """`Images` of a set that is small (sets.SETS with a function `load`)."""

    def __init__(self, pixels: Float[np.ndarray, "N C H W"], labels: Int[np.ndarray, "N"]) -> None:
        """Pixels in [-1, 1]."""
        self._pixels, self.labels, self.notes = pixels, labels, list[str]()

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Some of them, float32 [B, C, H, W]."""
        return self._pixels[indices]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def open_images(data: config.DataConfig, say: Callable[[str], None] = _to_stderr) -> Images:
    """The training images of a run. Where they lie in files, they stay there until they are read.

    `say` is told before a manifest is made, which takes its time, once.

    Raises:
        ConfigError: files absent, cut or of another kind; settings that do not describe the images.
    """
    if data.has_latents:
        return latents.LatentFiles(data)
    load = sets.SETS[data.name].load
    if load is None:
        return files.ImageFiles(data, say)
    sets.SETS[data.name].check(data.path)
    pixels, labels = load(data.path)
    channels, size = pixels.shape[1], pixels.shape[2]
    check(
        data.channels == channels, f"data.channels={data.channels}, but {data.name} has {channels}"
    )
    padding = data.size - size
    check(
        padding >= 0 and padding % 2 == 0,
        f"data.size={data.size} must be {size}, the size of {data.name}, or an even number more",
    )
    border = [(0, 0)] * 2 + [(padding // 2,) * 2] * 2
    pixels = np.pad(pixels, border, constant_values=-1)
    if data.num_classes == 0:
        return InMemory(pixels, np.full_like(labels, -1))
    classes = int(labels.max()) + 1
    check(
        data.num_classes == classes,
        f"data.num_classes={data.num_classes} must be 0 or {classes} for {data.name}",
    )
    return InMemory(pixels, labels)


def load_images(
    data: config.DataConfig,
) -> tuple[Float[torch.Tensor, "N C H W"], Int[torch.Tensor, "N"]]:
    """All of a small set in memory: images in [-1, 1], and their classes; see `open_images`."""
    images = open_images(data)
    pixels = images.read(np.arange(len(images)))
    return in_range(torch.from_numpy(np.ascontiguousarray(pixels))), torch.from_numpy(images.labels)


def in_range(pixels: torch.Tensor) -> Float[torch.Tensor, "*S"]:
    """Values in [-1, 1] of bytes; others are as they are."""
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


def check_files(data: config.DataConfig, say: Callable[[str], None] = _to_stderr) -> list[str]:
    """Sentences about what was found and what becomes of it. A manifest is made if there is none.

    Raises:
        ConfigError: images are absent or not those that settings describe; so it is known early.
    """
    if data.has_latents:
        latents.verify(Path(data.path))
        return latents.LatentFiles(data).notes
    if sets.SETS[data.name].load is None:
        return files.ImageFiles(data, say).notes
    sets.SETS[data.name].check(data.path)
    return []


@runtime_checkable
class Drawn(Protocol):
    """`Images` that are distributions: latents, with those of the mirrored images."""

    def draw(
        self, indices: np.ndarray, mirrored: np.ndarray, seed: int, ids: np.ndarray
    ) -> np.ndarray:
        """float32 [B, C, H, W], a function of the seed and the ids."""


class _Parts(Dataset[UInt8[torch.Tensor, "B C H W"]]):
    """All images in their order, `REFERENCE_BATCH` at a time."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return -(-len(self._images) // REFERENCE_BATCH)

    def __getitem__(self, part: int) -> torch.Tensor:
        first = part * REFERENCE_BATCH
        chosen = np.arange(first, min(first + REFERENCE_BATCH, len(self._images)))
        return torch.from_numpy(self._images.read(chosen))


def in_parts(
    data: config.DataConfig, images: Images, parts: Sequence[int] | None = None
) -> Iterator[torch.Tensor]:
    """All images in their order, `REFERENCE_BATCH` at a time, as `read` gives them; or some parts
    of that, by number.
    """
    whole = _Parts(images)
    chosen = range(len(whole)) if parts is None else parts
    return iter(DataLoader(whole, batch_size=None, sampler=chosen, num_workers=workers(data)))


def workers(data: config.DataConfig) -> int:
    """Processes that decode; none where nothing is to be decoded."""
    return data.workers if data.has_latents or sets.SETS[data.name].load is None else 0


# Noise of the images' stream starts here, so that no trajectory of the same seed starts from noise
# that its teacher was trained on.
FIRST_NOISE = 1 << 40


class ImageStream(Dataset[TrajectoryBatch]):
    """An endless stream over real images. Its position is the global step, nothing else.

    Every epoch shows each image once, shuffled by (seed, epoch). Rank r of W takes the entries with
    index = r mod W of each global batch, so the sequence does not depend on W. Worker processes, if
    there are any, make the batches of the next steps, noise included.
    """

    waiting_for = ""  # images are no reason that others could do something about

    def __init__(
        self,
        images: Images,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        label_dropout: float,
        flips: bool = False,
        workers: int = 0,
    ) -> None:
        """`batch_size` is global; a label becomes -1 with chance `label_dropout`, and with `flips`
        an image is mirrored with chance 1/2."""
        assert batch_size % world_size == 0
        self._images, self._labels = images, torch.from_numpy(images.labels)
        self._seed, self._batch_size = seed, batch_size
        self._rank, self._world_size = rank, world_size
        self._label_dropout, self._flips, self._workers = label_dropout, flips, workers
        self._epochs: dict[int, np.ndarray] = {}
        self._ahead: tuple[int, Iterator[TrajectoryBatch]] | None = None
        self.wait_s = 0.0  # seconds that `read` has kept its caller so far

    def read(self, step: int) -> TrajectoryBatch:
        """This rank's part of global batch `step`: state 0 is noise, state 1 a real image."""
        if self._workers == 0:
            return self[step]
        began = time.monotonic()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (
                step,
                iter(
                    DataLoader(
                        self,
                        batch_size=None,
                        sampler=range(step, sys.maxsize),
                        num_workers=self._workers,
                    )
                ),
            )
        ahead = self._ahead[1]
        batch = next(ahead)
        self._ahead = step + 1, ahead
        self.wait_s += time.monotonic() - began
        return batch

    def __getitem__(self, step: int) -> TrajectoryBatch:
        positions = np.arange(self._rank, self._batch_size, self._world_size)
        ids = step * self._batch_size + positions
        chosen = self._image_of(ids)
        mirrored = self._drawn("flips", step)[positions] < (0.5 if self._flips else 0)
        if isinstance(self._images, Drawn):
            drawn = self._images.draw(chosen, mirrored.numpy(), self._seed, ids)
            images = torch.from_numpy(drawn)
        else:
            images = in_range(torch.from_numpy(np.ascontiguousarray(self._images.read(chosen))))
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        noise = torch.from_numpy(
            sample_noise(self._seed, ids + FIRST_NOISE, tuple(images.shape[1:]))
        )
        dropped = self._drawn("label_dropout", step)[positions] < self._label_dropout
        return TrajectoryBatch(
            states=torch.stack([noise, images], dim=1)[:, None],
            times=torch.tensor([0.0, 1.0]),
            weights=torch.ones(len(ids), 1),
            condition=self._labels[chosen].masked_fill(dropped, -1),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            global_size=self._batch_size,
        )

    def _drawn(self, purpose: str, step: int) -> Float[torch.Tensor, "B"]:
        return torch.from_numpy(uniform(self._seed, purpose, step, self._batch_size))

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
