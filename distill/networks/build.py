"""Networks by configuration. Each is a `MeanVelocity` u(x, t, s, label) of `distill.flow.paths`."""

import torch

from distill.config import ConfigError, ImageSpec
from distill.networks.config import DiTConfig, NetworkConfig, UNetConfig
from distill.networks.dit import DiT
from distill.networks.layers import AbstractNetwork
from distill.networks.unet import UNet


def build_network(config: NetworkConfig, image: ImageSpec, seed: int = 0) -> AbstractNetwork:
    """The network of `config` for `image`, float32 on the CPU, its weights drawn from `seed` alone.

    Raises:
        ConfigError: an image size that the network cannot take.
    """
    # torch's layers draw their first weights from the global generator; it is set here and put
    # back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _construct(config, image)


def empty_network(config: NetworkConfig, image: ImageSpec) -> AbstractNetwork:
    """The network of `config` on the meta device: names and shapes, and no number yet.

    For weights that come from a file or another network (`distill.networks.files.load_weights`).

    Raises:
        ConfigError: an image size that the network cannot take.
    """
    with torch.device("meta"):
        return _construct(config, image)


def _construct(config: NetworkConfig, image: ImageSpec) -> AbstractNetwork:
    match config:
        case DiTConfig():
            return DiT(config, image)
        case UNetConfig():
            return UNet(config, image)
    raise ConfigError(f"student={type(config).__name__} is not a known network")
