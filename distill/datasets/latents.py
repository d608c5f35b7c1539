"""Latents of an image set, read by mapping its shards (`distill.datasets.encode`). No torch.

A folder of `latents.json` and `latents_00000.safetensors` .. with the names that LightningDiT gives
its tensors: `latents` [n, C, h, w], `latents_flip` of the mirrored images, `labels` [n]; and `std`,
`std_flip`, the deviation of the encoder's posterior, where it has one. Values are float16, as the
autoencoder scales them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from distill.config import ConfigError, check
from distill.datasets import config
from distill.flow.noise import sample_noise
from distill.run import files, records

FORMAT = 1
ABOUT = "latents.json"
PER_SHARD = 1000  # images
FIRST_NOISE = 1 << 41  # of the posterior: no trajectory and no image's noise has these ids


@dataclass(frozen=True)
class About:
    """The content of latents.json.

    Attributes:
        format: of this folder.
        autoencoder: name, fingerprint and path.
        images: the `data` settings of the images; their path is where they were.
        num_images, channels, size: what was encoded, and the shape of a latent.
        flips: whether mirrored images were encoded too.
        has_std: whether there are deviations.
        mean, std: of each channel over the set, in the latents' own scale.
        shards: sha256 of each file, by name.
    """

    format: int
    autoencoder: dict[str, str]
    images: dict[str, Any]
    num_images: int
    channels: int
    size: int
    flips: bool
    has_std: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: dict[str, str]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its values begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)), 8 + length
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{path} is cut or damaged ({error}); encode it again") from error


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a shard, mapped: pages are read when they are asked for."""
    header, start = read_header(path)
    kinds = {"F16": np.float16, "I64": np.int64}
    try:
        return {
            key: np.memmap(
                path, kinds[one["dtype"]], "r", start + one["data_offsets"][0], tuple(one["shape"])
            )
            for key, one in header.items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path} is cut or damaged ({error}); encode it again") from error


def read_about(path: Path) -> About:
    """What latents.json says.

    Raises:
        ConfigError: it is not there, or of another format.
    """
    try:
        about = records.read_record(About, path / ABOUT)
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.path={path} holds no {ABOUT}; `bowstring encode` makes it"
        ) from error
    except records.RecordError as error:
        raise ConfigError(str(error)) from error
    check(about.format == FORMAT, f"{path / ABOUT} is of format {about.format}, not {FORMAT}")
    return about


def verify(path: Path) -> None:
    """Raises ConfigError unless every shard is what was written."""
    for name, digest in read_about(path).shards.items():
        file = path / name
        check(
            file.is_file() and files.sha256_file(file) == digest,
            f"{file} is missing or not what was encoded; delete it, and `bowstring encode` makes "
            "it again",
        )


class LatentFiles:
    """`Images` that are latents, mapped from their shards.

    Attributes:
        labels, notes: as `images.Images`.
    """

    def __init__(self, data: config.DataConfig) -> None:
        """Raises ConfigError when the latents are not those that the settings describe."""
        path = Path(data.path)
        self.about = about = read_about(path)
        check(
            (about.channels, about.size) == (data.channels, data.size),
            f"data.channels={data.channels} data.size={data.size}, but {path} holds latents "
            f"[{about.channels}, {about.size}, {about.size}] of {about.autoencoder['name']}",
        )
        classes = int(about.images["num_classes"])
        check(
            data.num_classes in (0, classes),
            f"data.num_classes={data.num_classes} must be 0 or {classes}, as {path} was encoded",
        )
        check(
            not data.flips or about.flips,
            f"data.flips=true, but {path} has no mirrored images; encode with --flips",
        )
        self._shards = [map_shard(path / name) for name in about.shards]
        labels = np.concatenate([shard["labels"] for shard in self._shards])
        self.labels = labels if data.num_classes else np.full(len(labels), -1, np.int64)
        low, high = min(about.std), max(about.std)
        self.notes = [
            f"{path}: {about.num_images:,} latents of {about.autoencoder['name']}, deviation of a "
            f"channel {low:.2f} to {high:.2f}"
        ]
        if not 0.3 < low <= high < 3:
            self.notes.append("a flow wants about 1: is this the autoencoder's scaled space?")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> Float[np.ndarray, "B C H W"]:
        """Means of some images' latents."""
        return self._rows(indices, np.zeros(len(indices), bool), "latents")

    def draw(
        self, indices: np.ndarray, mirrored: np.ndarray, seed: int, ids: np.ndarray
    ) -> Float[np.ndarray, "B C H W"]:
        """Draws of the posteriors, of the mirrored images where asked: a function of (seed, id)."""
        mean = self._rows(indices, mirrored, "latents")
        if not self.about.has_std:
            return mean
        noise = sample_noise(seed, ids + FIRST_NOISE, mean.shape[1:])
        return mean + self._rows(indices, mirrored, "std") * noise

    def _rows(self, indices: np.ndarray, mirrored: np.ndarray, key: str) -> np.ndarray:
        shape = (len(indices), self.about.channels, self.about.size, self.about.size)
        out = np.empty(shape, np.float32)
        for row, (index, flip) in enumerate(zip(indices.tolist(), mirrored.tolist(), strict=True)):
            shard = self._shards[index // PER_SHARD]
            out[row] = shard[f"{key}_flip" if flip else key][index % PER_SHARD]
        return out
