"""A model on disk: `model.safetensors`, float32 weights, and `model.json`, of what. No pickle."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from distill.config import ConfigError, ImageSpec, check
from distill.networks.build import build_network, empty_network
from distill.networks.config import NetworkConfig, network_config
from distill.networks.layers import AbstractNetwork
from distill.run.files import replaced, sha256_file, write_atomic, write_json

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
    inspect: Callable[[Path], None] | None = None,
) -> None:
    """Writes the folder so that it is seen whole or not at all; a folder of that name is replaced.

    `state` holds at least every parameter; buffers may be left out. `meta` is anything JSON can
    hold. `inspect` sees the folder before anybody else; if it raises, nothing was written.
    """
    with replaced(folder) as made:
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in state.items()}
        write_atomic(made / WEIGHTS, save(tensors))
        write_json(made / DESCRIPTION, describe(network, image, meta))
        if inspect is not None:
            inspect(made)


def describe(network: NetworkConfig, image: ImageSpec, meta: dict[str, Any]) -> dict[str, Any]:
    """The content of model.json."""
    return {
        "format": FORMAT,
        "bowstring": version("bowstring"),
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
    network, meta = open_model(folder)
    load_weights(network, read_tensors(folder / WEIGHTS), folder / WEIGHTS, device)
    return network.eval().requires_grad_(False), meta


def open_model(folder: Path) -> tuple[AbstractNetwork, dict[str, Any]]:
    """The network without weights, and `meta`, of `load_model`.

    Raises:
        ConfigError: as `load_model`.
    """
    description = read_description(folder / DESCRIPTION)
    try:
        config = network_config(description["network"])
        network = empty_network(config, ImageSpec(**description["image"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / DESCRIPTION} does not describe a network ({error!r})"
        ) from error
    check_weights(network, read_shapes(folder / WEIGHTS), folder / WEIGHTS)
    meta = {key: description[key] for key in ("network", "image")} | description["meta"]
    return network, meta


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
    """The tensors of a safetensors file. It is mapped: each is read where it is used.

    Raises:
        ConfigError: missing, cut or of another kind.
    """
    with _whole(path):
        return load_file(path)


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors of a safetensors file, from its header alone.

    Raises:
        ConfigError: missing, cut or of another kind.
    """
    with _whole(path), safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in names}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Makes ConfigErrors of what safetensors says of a file."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        yield
    except SafetensorError as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); it is cut or not a safetensors file"
        ) from error


def shapes_of(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of every tensor."""
    return {name: value.shape for name, value in state.items()}


def fixed_tensors(network: AbstractNetwork) -> dict[str, Tensor]:
    """Copies, on the CPU, of all that the state of `network` holds beside trained parameters.

    Such as a table of positions. That of the constructor need not be it: a teacher may have brought
    its own.
    """
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in network.state_dict().items()
        if name not in trained
    }


def check_weights(
    network: AbstractNetwork, shapes: dict[str, torch.Size], source: Path | str
) -> None:
    """Compares names and shapes of a state with those of `network`; two kinds may be left out.

    The second-time branch `s_embedder.*` may be absent, and so may buffers.

    Raises:
        ConfigError: names `source` and the first entry that does not fit.
    """
    own = network.state_dict()
    optional = {name for name in own if name.startswith(SECOND_TIME)} | dict(
        network.named_buffers()
    ).keys()
    for problem, names in (
        ("lacks", own.keys() - shapes.keys() - optional),
        ("has unknown", shapes.keys() - own.keys()),
    ):
        if names:
            raise ConfigError(
                f"{source} {problem} {len(names)} tensors of this network, first {min(names)}"
            )
    for name, shape in shapes.items():
        if shape != own[name].shape:
            expected = list(own[name].shape)
            raise ConfigError(f"{source}: {name} is {list(shape)}, the network has {expected}")


def load_weights(
    network: AbstractNetwork,
    state: dict[str, Tensor],
    source: Path | str,
    device: torch.device | str = "cpu",
) -> AbstractNetwork:
    """`network`, an `empty_network`, with copies of `state` on `device`, in its own dtypes.

    What `state` may leave out (`check_weights`) is as `build_network` makes it of seed 0, where the
    second-time branch is inert.

    Raises:
        ConfigError: names `source` and the first entry that does not fit.
    """
    check_weights(network, shapes_of(state), source)
    own = network.state_dict()
    state = own | state
    left_out = [name for name, value in state.items() if value.is_meta]
    if left_out:
        start = build_network(network.config.shallowest(), network.image).state_dict()
        state |= {name: start[name] for name in left_out}
    # Copies, since a mapped file may be written over; one by one, since nothing else is as large.
    copies = {
        name: torch.empty(value.shape, dtype=value.dtype, device=device).copy_(state[name])
        for name, value in own.items()
    }
    network.load_state_dict(copies, assign=True)
    return network


def with_weights_of(
    start: AbstractNetwork, config: NetworkConfig, image: ImageSpec
) -> AbstractNetwork | None:
    """The network of `config`, to be trained, with the tensors of `start` itself.

    None when they do not fit it.

    Raises:
        ConfigError: an image size that the network of `config` cannot take.
    """
    network, state = empty_network(config, image), start.state_dict()
    if shapes_of(network.state_dict()) != shapes_of(state) or unlike(start.config, config):
        return None
    network.load_state_dict(state, assign=True)
    return network


def unlike(start: NetworkConfig, config: NetworkConfig) -> list[str]:
    """The settings of `config`, in words, that differ from `start`'s though no shape shows it."""
    return [
        f"{name}={getattr(config, name)}"
        for name in config.not_in_shapes
        if getattr(config, name) != getattr(start, name, None)
    ]


def fingerprint(path: Path) -> str:
    """sha256, in hex, of a file of weights.

    Raises:
        ConfigError: the file is missing.
    """
    check(path.is_file(), f"{path} is missing")
    return sha256_file(path)
