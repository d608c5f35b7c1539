"""Checkpoints of the public SiT code (Ma et al., 2024): the same network, the same time convention.

SiT's linear path is x_t = t x_1 + (1 - t) x_0 with data x_1, and its network predicts x_1 - x_0
with t unscaled: our convention. With `learn_sigma` it puts out twice the channels; the first half
is the velocity.
"""

import argparse
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from distill.config import ConfigError, ImageSpec
from distill.networks.build import empty_network
from distill.networks.config import DiTConfig
from distill.networks.files import check_weights, fingerprint, load_weights, read_tensors
from distill.networks.layers import AbstractNetwork
from distill.teachers.base import NetworkTeacher, TeacherDescription
from distill.teachers.config import SiTConfig

# Heads of the published sizes S, B, L, XL by width; the weights do not tell.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def describe_sit(config: SiTConfig) -> TeacherDescription:
    """What a file of weights holds. A `.pt` from before torch 1.6 is read whole for that.

    Raises:
        ConfigError: file missing, cut, or of another network; heads unknown.
    """
    network, _ = _open(config)
    return TeacherDescription(network.image, fingerprint(Path(config.path)))


def load_sit(config: SiTConfig, device: torch.device | str) -> NetworkTeacher:
    """The teacher in a file of weights. The last row of its label table must be "none".

    Raises as `describe_sit`.
    """
    description = describe_sit(config)
    return NetworkTeacher(load_sit_network(config, device), description)


def load_sit_network(config: SiTConfig, device: torch.device | str) -> AbstractNetwork:
    """The frozen network, on `device`. Raises as `describe_sit`."""
    network, state = _open(config)
    return load_weights(network, state, config.path, device).eval().requires_grad_(False)


def _open(config: SiTConfig) -> tuple[AbstractNetwork, dict[str, Tensor]]:
    """The network without weights of a file, `.safetensors` or `.pt`, and its tensors, unread.

    Of a file of SiT's trainer the moving average is taken. Sizes are read off the weights.
    """
    path = Path(config.path)
    state = read_tensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    try:
        width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        grid = round(state["pos_embed"].shape[1] ** 0.5)
        num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        outputs = len(state["final_layer.linear.weight"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not hold the weights of a SiT ({error})") from error
    heads = config.num_heads or HEADS.get(width, 0)
    if heads == 0:
        raise ConfigError(f"{path} has width {width}, no published size: set teacher.num_heads")
    if outputs == 2 * channels * patch_size**2:
        state = _first_half(state, patch_size)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    sizes = DiTConfig(
        patch_size=patch_size, width=width, depth=depth, num_heads=heads, mlp_ratio=hidden / width
    )
    network = empty_network(sizes, ImageSpec(channels, grid * patch_size, num_classes))
    check_weights(network, state, path)
    return network, state


def _first_half(state: dict[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """`state` without the outputs of the second half of the channels."""
    # Rows are ordered (row, column, channel).
    changed = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (patch_size * patch_size, 2, -1))
        changed[name] = rows[:, 0].flatten(0, 1)
    return changed


def _read_pt(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch file, opened without running any code in it."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        # Mapped, so that only what is used is read: of a trainer's file one part in four.
        mapped = zipfile.is_zipfile(path) and _is_stored(path)
        # SiT's trainer stores its command-line arguments next to the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"{path} cannot be read as plain weights; it is cut, or holds more than tensors "
            f"({str(error).splitlines()[0]})"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"{path} does not hold a dictionary of tensors")
    return content


def _is_stored(path: Path) -> bool:
    """Whether no member of a zip file is compressed, as torch writes it."""
    with zipfile.ZipFile(path) as file:
        return all(member.compress_type == zipfile.ZIP_STORED for member in file.infolist())
