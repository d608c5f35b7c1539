"""Batches of real images, for the training of a teacher and as the reference of an evaluation."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn import functional as F

from distill.config import check
from distill.data import config, sets
from distill.flow.noise import permutation, sample_noise, uniform
from distill.flow.trajectory import TrajectoryBatch


def load_images(
    data: config.DataConfig,
) -> tuple[Float[torch.Tensor, "N C H W"], Int[torch.Tensor, "N"]]:
    """All training images in [-1, 1], and their classes (-1 when data.num_classes is 0).

    Raises:
        ConfigError: files absent, cut or of another kind; settings that do not describe the images.
    """
    check_files(data)
    pixels, classes_of = sets.SETS[data.name].load(data.path)
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    labels = torch.from_numpy(classes_of)
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


def check_files(data: config.DataConfig) -> None:
    """Raises ConfigError when a file of the data set is absent, so that it is known early."""
    sets.SETS[data.name].check(data.path)


# Noise of the images' stream starts here, so that no trajectory of the same seed starts from noise
# that its teacher was trained on.
FIRST_NOISE = 1 << 40


class ImageStream:
    """An endless stream over real images. Its position is the global step, nothing else.

    Every epoch shows each image once, shuffled by (seed, epoch). Rank r of W takes the entries with
    index = r mod W of each global batch, so the sequence does not depend on W.
    """

    wait_s, waiting_for = 0.0, ""  # images never make a trainer wait

    def __init__(
        self,
        images: Float[torch.Tensor, "N C H W"],
        labels: Int[torch.Tensor, "N"],
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
            weights=torch.ones(len(ids), 1),
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
