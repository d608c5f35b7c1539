"""Checkpoints of the public SiT code (Ma et al., 2024): the same network, the same time convention.

SiT's linear path is x_t = t x_1 + (1 - t) x_0 with data x_1, and its network predicts x_1 - x_0
with t unscaled: our convention. With `learn_sigma` it puts out twice the channels; the first half
is the velocity.
"""

import argparse
import pickle
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ConfigError, ImageSpec
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.networks.files import fingerprint, load_weights, read_tensors

# Heads of the published sizes S, B, L, XL by width; the weights do not tell.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


class SiTTeacher:
    """A SiT network as a teacher. The last row of its label table must be "none"."""

    def __init__(
        self, config: DiTConfig, image: ImageSpec, state: dict[str, Tensor], source: Path
    ) -> None:
        self.network = build_network(config, image)
        load_weights(self.network, state, source)
        self.network.eval().requires_grad_(False)
        self.image = image
        self.fingerprint = fingerprint(source)

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, label)."""
        return self.network(x, t, t, label)


def load_sit(path: Path, num_heads: int, device: torch.device | str) -> SiTTeacher:
    """The teacher in a file of weights, `.safetensors` or `.pt`, or in one of SiT's trainer.

    Of the trainer's file the moving average is taken. Sizes are read off the weights; `num_heads`
    0 means that of the published model of this width.

    Raises:
        ConfigError: file missing, cut, or of another network; heads unknown.
    """
    state = read_tensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    try:
        width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        grid = round(state["pos_embed"].shape[1] ** 0.5)
        num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        outputs = len(state["final_layer.linear.weight"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not hold the weights of a SiT ({error})") from error
    heads = num_heads or HEADS.get(width, 0)
    if heads == 0:
        raise ConfigError(f"{path} has width {width}, no published size: set teacher.num_heads")
    if outputs == 2 * channels * patch_size**2:
        state = _first_half(state, patch_size)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    config = DiTConfig(
        patch_size=patch_size, width=width, depth=depth, num_heads=heads, mlp_ratio=hidden / width
    )
    image = ImageSpec(channels, grid * patch_size, num_classes)
    teacher = SiTTeacher(config, image, state, path)
    teacher.network.to(device)
    return teacher


def _first_half(state: dict[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """`state` without the outputs of the second half of the channels."""
    # Rows are ordered (row, column, channel).
    changed = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (patch_size * patch_size, 2, -1))
        changed[name] = rows[:, 0].flatten(0, 1)
    return changed


def _read_pt(path: Path) -> dict[str, Tensor]:
    """Weights of a torch file, read without running any code in it."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        # SiT's trainer stores its command-line arguments next to the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as plain weights; it is cut, or holds more than tensors "
            f"({str(error).splitlines()[0]})"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"{path} does not hold a dictionary of tensors")
    return content
