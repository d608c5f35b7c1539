"""One encoded picture -> pixels: PNG, JPEG, WebP and whatever else Pillow opens. No torch.

Crops by name, all of them deterministic:

    none     the picture as it is; a larger `size` gives it a black border
    adm      ADM's `center_crop_arr` (Dhariwal & Nichol, 2021), as EDM, DiT and SiT use it: halved
             with a box filter while the short side is at least twice `size`, then bicubic until it
             is `size`, then the middle
    celeba   the middle 140 x 140 of CelebA's aligned 178 x 218, then bilinear, as score_sde,
             RectifiedFlow and their successors do
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CELEBA_PIXELS = 140
WHITE = (255, 255, 255, 255)
# What Pillow raises for a file that is cut, or something else.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class BrokenPicture(ValueError):
    """A file that cannot be decoded. The message says why."""


@dataclass(frozen=True)
class Seen:
    """What a picture is: Pillow's mode ("RGB", "L", "RGBA", "CMYK" ..), and its size in pixels."""

    mode: str
    width: int
    height: int


def open_picture(content: bytes) -> Image.Image:
    """The first frame of a picture, decoded.

    Raises:
        BrokenPicture: it is none, cut, or of a kind of pixels that has no range (32 bits).
    """
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except BROKEN as error:
        raise BrokenPicture(str(error).split(" <_io.")[0]) from error  # no address in memory
    if picture.mode in ("I", "F"):
        raise BrokenPicture(f"pixels of mode {picture.mode} have no range")
    return picture


def look(content: bytes) -> Seen:
    """Mode and size, after decoding all of it; raises as `open_picture`."""
    picture = open_picture(content)
    return Seen(picture.mode, picture.width, picture.height)


def converted(picture: Image.Image, channels: int) -> Image.Image:
    """The picture as grey (1) or RGB (3): transparent parts on white, 16 bits as their upper 8."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("RGB" if channels == 3 else "L")


def cropped(picture: Image.Image, size: int, crop: str) -> Image.Image:
    """`size` x `size` pixels of a grey or RGB picture, by the name of a crop; `none` pads only."""
    if crop == "adm":
        return _adm(picture, size)
    if crop == "celeba":
        left, top = ((side - CELEBA_PIXELS) // 2 for side in picture.size)
        middle = picture.crop((left, top, left + CELEBA_PIXELS, top + CELEBA_PIXELS))
        return middle.resize((size, size), Image.Resampling.BILINEAR)
    if picture.size == (size, size):
        return picture
    padded = Image.new(picture.mode, (size, size))
    padded.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return padded


def _adm(picture: Image.Image, size: int) -> Image.Image:
    while min(picture.size) >= 2 * size:
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def pixels_of(
    picture: Image.Image, channels: int, size: int, crop: str
) -> UInt8[np.ndarray, "C H W"]:
    """The pixels that a network sees."""
    array = np.asarray(cropped(converted(picture, channels), size, crop))
    return array.reshape(size, size, channels).transpose(2, 0, 1)
