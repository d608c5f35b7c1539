"""A network through torch.compile, but for calls inside a forward-mode derivative."""

import os
import shutil

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from distill.config import ConfigError
from distill.flow.paths import MeanVelocity
from distill.networks.layers import AbstractNetwork


def compiled(network: AbstractNetwork) -> MeanVelocity:
    """u(x, t, s, label) of `network`, its weights as they are at each call; gradients to rounding.

    torch.compile inside torch.func.jvp runs uncompiled, and all later calls with it (torch 2.15.0).
    So a call with a tangent takes the network as it is. A compiled pass cannot be differentiated
    twice.

    Raises:
        ConfigError: there is no C++ compiler, which torch.compile needs.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile=true needs a C++ compiler, and there is no {compiler} on this node; "
            "install one, name it in CXX, or set train.compile=false"
        )
    # Else a graph that is kept for a second pass back, as adaptive weights do, would be refused.
    torch._functorch.config.donated_buffer = False
    fast = torch.compile(network, fullgraph=True)

    def forward(
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        is_dual = any(forward_ad.unpack_dual(value).tangent is not None for value in (x, t, s))
        return (network if is_dual else fast)(x, t, s, label)

    return forward
