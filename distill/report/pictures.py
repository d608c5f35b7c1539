"""Pictures and arrays as files: grids, PNG, npz. Needs numpy and Pillow, no torch."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from distill.run.files import write_atomic

MIN_PIXELS = 64  # height of a picture in a grid
LINE, GREY = 2, 96  # pixels between pictures, and their value


def tile(images: UInt8[np.ndarray, "N C H W"], columns: int) -> Image.Image:
    """A grid of pictures, row by row, with grey lines between them. Small ones are enlarged by
    whole factors, not smoothed.
    """
    factor = max(1, -(-MIN_PIXELS // images.shape[2]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    num, channels, height, width = images.shape
    rows, height, width = -(-num // columns), height + LINE, width + LINE
    grid = np.full((rows * columns, channels, height, width), GREY, dtype=np.uint8)
    grid[:num, :, :-LINE, :-LINE] = images
    grid = grid.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, channels)[:-LINE, :-LINE]
    return Image.fromarray(grid[:, :, 0] if channels == 1 else grid)


def write_png(path: Path, picture: Image.Image) -> None:
    """Writes a PNG atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


def write_npz(path: Path, arrays: dict[str, np.ndarray | np.generic]) -> None:
    """Writes arrays as a compressed npz, atomically and without pickle."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())
