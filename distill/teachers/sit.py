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
from distill.networks import files, layers
from distill.networks.build import empty_network
from distill.networks.config import DiTConfig
from distill.teachers.base import NetworkTeacher, TeacherDescription
from distill.teachers.config import SiTConfig

FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")
# Heads of the published sizes S, B, L, XL by width; the weights do not tell.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def describe_sit(config: SiTConfig) -> TeacherDescription:
    """What a file of weights holds. A `.pt` that cannot be mapped is read whole for that.

    Raises:
        ConfigError: file missing, cut, or of another network; heads unknown.
    """
    path = Path(config.path)
    is_pt = path.suffix != ".safetensors"
    network = _empty(config, files.shapes_of(_read_pt(path)) if is_pt else files.read_shapes(path))
    return TeacherDescription(network.image, files.fingerprint(path))


def load_sit(config: SiTConfig, device: torch.device | str) -> NetworkTeacher:
    """The teacher in a file of weights. The last row of its label table must be "none".

    Raises as `describe_sit`.
    """
    description = describe_sit(config)
    return NetworkTeacher(load_sit_network(config, device), description)


def load_sit_network(config: SiTConfig, device: torch.device | str) -> layers.AbstractNetwork:
    """The frozen network, on `device`. Raises as `describe_sit`."""
    path = Path(config.path)
    state = files.read_tensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    network = _empty(config, files.shapes_of(state))
    own = network.state_dict()
    for name in FINAL:
        if len(state[name]) != len(own[name]):
            state[name] = _first_half(state[name], network.image.channels)
    return files.load_weights(network, state, path, device).eval().requires_grad_(False)


def _empty(config: SiTConfig, shapes: dict[str, torch.Size]) -> layers.AbstractNetwork:
    """The network without weights whose tensors, or twice its last ones, have these `shapes`."""
    path = config.path
    try:
        width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        grid = round(shapes["pos_embed"][1] ** 0.5)
        num_classes = shapes["y_embedder.embedding_table.weight"][0] - 1
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
        outputs = shapes["final_layer.linear.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} does not hold the weights of a SiT ({error})") from error
    heads = config.num_heads or HEADS.get(width, 0)
    if heads == 0:
        raise ConfigError(f"{path} has width {width}, no published size: set teacher.num_heads")
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    sizes = DiTConfig(
        patch_size=patch_size, width=width, depth=depth, num_heads=heads, mlp_ratio=hidden / width
    )
    network = empty_network(sizes, ImageSpec(channels, grid * patch_size, num_classes))
    if outputs == 2 * channels * patch_size**2:
        shapes = shapes | {
            name: torch.Size([shapes[name][0] // 2, *shapes[name][1:]]) for name in FINAL
        }
    files.check_weights(network, shapes, path)
    return network


def _first_half(value: Tensor, channels: int) -> Tensor:
    """The rows of `value`, a tensor of the last layer, that make the first `channels` channels."""
    return value.unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1)  # (row and column, channel)


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
