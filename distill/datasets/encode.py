"""Encodes an image set into latents, once, shard by shard (`distill.datasets.latents`)."""

import json
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from distill.config import check
from distill.datasets import config, images, latents
from distill.networks.autoencoder import Autoencoder, load_autoencoder
from distill.run import files, records

ORIGIN = "origin"  # metadata of a shard: sha256 of what was encoded, by what
PARTS = latents.PER_SHARD // images.REFERENCE_BATCH  # of a shard


def encode(
    data: config.DataConfig, autoencoder: str, out: Path, flips: bool, say: Callable[[str], None]
) -> latents.About:
    """Encodes the images of `data` into the folder `out`; what is there already is kept.

    A shard is committed whole, so a killed encoding goes on with the same command. It
    takes the GPU where there is one.

    Raises:
        ConfigError: images that are not RGB; a folder that holds latents of something else.
    """
    check(data.channels == 3, f"data.channels={data.channels}: autoencoders read RGB; set 3")
    real, device = images.open_images(data, say), "cuda" if torch.cuda.is_available() else "cpu"
    coder = load_autoencoder(autoencoder, device)
    settings = asdict(data) | {"path": str(Path(data.path).absolute())}
    source = {key: settings[key] for key in settings if key not in ("workers", "manifest", "path")}
    digest = getattr(real, "sha256", data.name)
    origin = json.dumps([coder.fingerprint, digest, source, flips], sort_keys=True)
    origin = sha256(origin.encode()).hexdigest()
    names = [f"latents_{i:05d}.safetensors" for i in range(-(-len(real) // latents.PER_SHARD))]
    missing = [index for index, name in enumerate(names) if not _is_whole(out / name, origin)]
    parts = -(-len(real) // images.REFERENCE_BATCH)
    wanted = [p for i in missing for p in range(i * PARTS, min((i + 1) * PARTS, parts))]
    pixels = images.in_parts(data, real, wanted)
    for index in missing:
        labels = real.labels[index * latents.PER_SHARD : (index + 1) * latents.PER_SHARD]
        count = -(-len(labels) // images.REFERENCE_BATCH)
        encoded = [_encoded(coder, next(pixels), flips) for _ in range(count)]
        tensors = {key: torch.cat([part[key] for part in encoded]) for key in encoded[0]}
        tensors["labels"] = torch.from_numpy(labels.copy())
        files.write_atomic(out / names[index], save(tensors, {ORIGIN: origin}))
        say(f"{out}: {min((index + 1) * latents.PER_SHARD, len(real)):,} of {len(real):,} images")
    about = _about(out, names, coder, settings, str(Path(autoencoder).absolute()), flips)
    files.write_json(out / latents.ABOUT, records.tree_of(about))
    return about


def _encoded(coder: Autoencoder, pixels: torch.Tensor, flips: bool) -> dict[str, torch.Tensor]:
    found = {}
    values = images.in_range(pixels)
    for suffix, shown in (("", values), ("_flip", values.flip(-1)))[: 1 + flips]:
        mean, std = coder.encode(shown)
        found[f"latents{suffix}"] = mean.half().cpu().contiguous()
        if std is not None:
            found[f"std{suffix}"] = std.half().cpu().contiguous()
    check(bool(found["latents"].isfinite().all()), "the autoencoder gives values beyond float16")
    return found


def _is_whole(path: Path, origin: str) -> bool:
    """Whether the shard is there; a write has its name when it is whole.

    Raises:
        ConfigError: it is of other images, another autoencoder or other settings.
    """
    if not path.is_file():
        return False
    check(
        latents.read_header(path)[0].get("__metadata__", {}).get(ORIGIN) == origin,
        f"{path} holds latents of other images, another autoencoder or other settings; take "
        "another folder by --out",
    )
    return True


def _about(
    out: Path,
    names: list[str],
    coder: Autoencoder,
    settings: dict[str, Any],
    path: str,
    flips: bool,
) -> latents.About:
    """What the folder holds, from its files, so that it does not depend on who wrote which."""
    total = square = np.zeros(1)
    count = 0
    for name in names:
        values = latents.map_shard(out / name)["latents"].astype(np.float64)
        total = total + values.sum(axis=(0, 2, 3))
        square = square + (values**2).sum(axis=(0, 2, 3))
        count += len(values)
    pixels = count * values.shape[2] * values.shape[3]
    mean = total / pixels
    std = np.sqrt(np.maximum(square / pixels - mean**2, 0))
    return latents.About(
        format=latents.FORMAT,
        autoencoder={"name": coder.name, "fingerprint": coder.fingerprint, "path": path},
        images=settings,
        num_images=count,
        channels=values.shape[1],
        size=values.shape[2],
        flips=flips,
        has_std="std" in latents.map_shard(out / names[0]),
        mean=tuple(mean.round(6).tolist()),
        std=tuple(std.round(6).tolist()),
        shards={name: files.sha256_file(out / name) for name in names},
    )
