"""Networks by configuration. Each is a `MeanVelocity` u(x, t, s, label) of `distill.flow.paths`."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from distill.config import ConfigError, ImageSpec
from distill.networks import (
    config as settings,
    dit,
    edm2_unet,
    edm_unet,
    layers,
    lightningdit,
    unet,
)
from distill.networks.config import NetworkConfig


def build_network(config: NetworkConfig, image: ImageSpec, seed: int = 0) -> layers.AbstractNetwork:
    """The network of `config` for `image`, float32 on the CPU, its weights drawn from `seed` alone.

    Raises:
        ConfigError: an image size that the network cannot take.
    """
    # torch's layers draw their first weights from the global generator; it is set here and put
    # back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _construct(config, image)


def empty_network(config: NetworkConfig, image: ImageSpec) -> layers.AbstractNetwork:
    """The network of `config` without weights: its parameters are on the meta device.

    For weights that come from a file or another network (`distill.networks.files.load_weights`).
    Buffers are whole.

    Raises:
        ConfigError: an image size that the network cannot take.
    """
    with _WithoutWeights():
        return _construct(config, image)


class _WithoutWeights(TorchFunctionMode):
    """What torch's layers allocate is on the meta device, and they draw nothing.

    All else is computed as ever. `torch.device("meta")` would put that on the meta device too,
    where a draw or a power makes torch import its compiler: seconds, and 180 MB.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **kwargs | {"device": "meta"})
        if func.__name__.endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _construct(config: NetworkConfig, image: ImageSpec) -> layers.AbstractNetwork:
    match config:
        case settings.LightningDiTConfig():
            return lightningdit.LightningDiT(config, image)
        case settings.DiTConfig():
            return dit.DiT(config, image)
        case settings.UNetConfig():
            return unet.UNet(config, image)
        case settings.EdmUNetConfig():
            return edm_unet.EdmUNet(config, image)
        case settings.Edm2UNetConfig():
            return edm2_unet.Edm2UNet(config, image)
    raise ConfigError(f"student={type(config).__name__} is not a known network")
