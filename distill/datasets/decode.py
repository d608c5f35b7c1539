"""Latents as pictures: what decodes those of a run, and what they are compared with."""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, UInt8

from distill.config import check
from distill.datasets import config, latents
from distill.networks.autoencoder import load_autoencoder


def to_uint8(images: Float[torch.Tensor, "B C H W"]) -> UInt8[torch.Tensor, "B C H W"]:
    """Pixels 0 .. 255 for images in [-1, 1]; values outside are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pictures(
    data: config.DataConfig, device: torch.device | str
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes bytes of samples [N, C, H, W]; None where latents have no autoencoder.

    Raises:
        ConfigError: the autoencoder is not there, or another one than the latents were made by.
    """
    if data.image.is_picture:
        return to_uint8
    about = latents.read_about(Path(data.path)) if data.has_latents else None
    place = data.autoencoder or (about.autoencoder["path"] if about else "")
    if not place:
        return None
    coder = load_autoencoder(place, device)
    made_by = about.autoencoder["fingerprint"] if about else coder.fingerprint
    check(
        coder.fingerprint == made_by,
        f"data.autoencoder={place} is not the one that encoded data.path={data.path}, which is "
        f"{about.autoencoder if about else ''}",
    )
    return lambda samples: to_uint8(coder.decode(samples))


def reference(data: config.DataConfig) -> config.DataConfig:
    """The images that decoded samples are compared with: of latents, those that were encoded."""
    if not data.has_latents:
        return data
    return config.DataConfig(**latents.read_about(Path(data.path)).images)
