"""A model on disk: `model.safetensors`, float32 weights, and `model.json`, of what. No pickle."""

import json
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from distill.config import ConfigError, ImageSpec, check
from distill.networks.build import build_network
from distill.networks.config import NetworkConfig, network_config
from distill.networks.layers import AbstractNetwork
from distill.run.files import sha256_file, sync_directory, write_atomic, write_json

FORMAT = "bowstring-model-1"
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
# Parameters a file of a plain velocity network (SiT, an early export) does not have.
SECOND_TIME = "s_embedder."


def save_model(
    folder: Path,
    state: dict[str, Tensor],
    network: NetworkConfig,
    image: ImageSpec,
    meta: dict[str, Any],
) -> None:
    """Writes the folder so that it is seen whole or not at all; a folder of that name is replaced.

    `state` holds at least every parameter; buffers may be left out. `meta` is anything JSON can
    hold.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    temporary = folder.with_name(f".{folder.name}.tmp-{unique}")
    temporary.mkdir()
    try:
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in state.items()}
        write_atomic(temporary / WEIGHTS, save(tensors))
        write_json(temporary / DESCRIPTION, describe(network, image, meta))
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{unique}")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(folder.parent)


def describe(network: NetworkConfig, image: ImageSpec, meta: dict[str, Any]) -> dict[str, Any]:
    """The content of model.json."""
    return {
        "format": FORMAT,
        "network": asdict(network),
        "image": asdict(image),
        "time": "t = 0 noise, t = 1 data; output: mean velocity over [t, s]",
        "meta": meta,
    }


def load_model(folder: Path, device: torch.device | str) -> tuple[AbstractNetwork, dict[str, Any]]:
    """The frozen network on `device`, and the `meta` it was saved with plus "network" and "image".

    Raises:
        ConfigError: a file is missing, cut, or does not fit the description.
    """
    description = read_description(folder / DESCRIPTION)
    try:
        network = network_config(description["network"])
        module = build_network(network, ImageSpec(**description["image"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / DESCRIPTION} does not describe a network ({error!r})"
        ) from error
    load_weights(module, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    meta = {key: description[key] for key in ("network", "image")} | description["meta"]
    return module.to(device).eval().requires_grad_(False), meta


def read_description(path: Path) -> dict[str, Any]:
    """The content of a model.json, checked as far as its outer form.

    Raises:
        ConfigError: missing, not JSON, or of another format.
    """
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: not a model folder") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ConfigError(f"{path} is not of the format {FORMAT}")
    missing = {"network", "image", "meta"} - description.keys()
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}")
    return description


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ConfigError: missing, cut or of another kind.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); it is cut or not a safetensors file"
        ) from error


def load_weights(module: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """Copies `state` into `module`. Names and shapes must match, with two exceptions.

    The second-time branch `s_embedder.*` may be absent (it then keeps its inert start), and so may
    buffers, which the constructor computes.

    Raises:
        ConfigError: names `source` and the first entry that does not fit.
    """
    own = module.state_dict()
    optional = {name for name in own if name.startswith(SECOND_TIME)} | dict(
        module.named_buffers()
    ).keys()
    for problem, names in (
        ("lacks", own.keys() - state.keys() - optional),
        ("has unknown", state.keys() - own.keys()),
    ):
        if names:
            raise ConfigError(
                f"{source} {problem} {len(names)} tensors of this network, first {min(names)}"
            )
    for name, value in state.items():
        if value.shape != own[name].shape:
            expected = list(own[name].shape)
            raise ConfigError(
                f"{source}: {name} is {list(value.shape)}, the network has {expected}"
            )
    module.load_state_dict(state, strict=False)


def fingerprint(path: Path) -> str:
    """sha256, in hex, of a file of weights.

    Raises:
        ConfigError: the file is missing.
    """
    check(path.is_file(), f"{path} is missing")
    return sha256_file(path)
