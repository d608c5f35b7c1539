"""What both networks share: embeddings of t, of the jump s - t and of the label; attention; and how
one goes through torch.compile.

Every layer works in the dtype of its weights; angles of the sinusoids are at least float32.
"""

import math
import os
import shutil
from abc import abstractmethod

import torch.utils.checkpoint
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.config import ImageSpec, check
from distill.flow.paths import MeanVelocity
from distill.networks.config import NetworkConfig

# Below this many tokens explicit attention beats the fused CPU kernel (16 tokens, batch 256: 0.8 ms
# against 1.4 ms).
EXPLICIT_TOKENS = 32


class AbstractNetwork(nn.Module):
    """u(x, t, s, label): mean velocity over [t, s]; at s = t the instantaneous velocity.

    Attributes:
        config: the settings it was built from.
        image: shape and classes it works on.
        activation_checkpointing: whether a pass back computes each block's activations again
            instead of keeping them. Gradients are the same, bit for bit on the same device.
    """

    activation_checkpointing = False

    def __init__(self, config: NetworkConfig, image: ImageSpec) -> None:
        super().__init__()
        self.config = config
        self.image = image

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """block(*inputs), checkpointed where that is set and a gradient may be asked for."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            output = torch.utils.checkpoint.checkpoint(
                block, *inputs, use_reentrant=False, preserve_rng_state=False
            )
            assert isinstance(output, Tensor)
            return output
        return block(*inputs)

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weight of the layer that makes the output. Every loss has a gradient there."""

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, s, label) in the dtype of x; label -1 is "none"."""


def _angles(t: Float[Tensor, "B"], highest: float, lowest: float, count: int) -> Tensor:
    """[B, count]: t times `count` frequencies, geometric from `highest` down towards `lowest`."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    steps = torch.arange(count, dtype=dtype, device=t.device) / count
    return t.to(dtype)[:, None] * (highest * torch.exp(math.log(lowest / highest) * steps))


class TimeEmbedder(nn.Module):
    """Embeds t as SiT does: cos(w t), sin(w t) for w from 1 to 1e-4, then an MLP."""

    num_features = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        first, last = nn.Linear(self.num_features, width), nn.Linear(width, width)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """[B, width]."""
        angles = _angles(t, 1.0, 1e-4, self.num_features // 2)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp.get_parameter("0.weight").dtype))


class JumpEmbedder(nn.Module):
    """Embeds the jump d = s - t: 0 at d = 0 whatever the weights, and 0 for every d at the start.

    The features sin(w d), cos(w d) - 1 are 0 at d = 0 and the MLP has no bias. So training on s = t
    alone (a teacher) neither feels nor changes this branch, and a student that starts from a
    teacher has u(x, t, s) = v(x, t) for all s.
    """

    num_features = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        first = nn.Linear(self.num_features, width, bias=False)
        last = nn.Linear(width, width, bias=False)
        nn.init.xavier_uniform_(first.weight)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, d: Float[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """[B, width]."""
        # Up to two turns over the longest jump: finer features would make du/ds noisy.
        angles = _angles(d, 4 * math.pi, 0.1, self.num_features // 2)
        features = torch.cat([angles.sin(), -2 * torch.sin(angles / 2) ** 2], dim=-1)
        return self.mlp(features.to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """Embeds the class; the last of the num_classes + 1 rows is "none", label -1."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, label: Int[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """[B, width]."""
        return self.embedding_table(torch.where(label < 0, self.num_classes, label))


def attention(
    q: Float[Tensor, "B heads T D"],
    k: Float[Tensor, "B heads T D"],
    v: Float[Tensor, "B heads T D"],
) -> Float[Tensor, "B heads T D"]:
    """softmax(q k^T / sqrt(D)) v.

    The fused kernels have no forward-mode derivative, so a call inside a JVP is written out.
    """
    if q.shape[-2] > EXPLICIT_TOKENS and torch.autograd.forward_ad.unpack_dual(q).tangent is None:
        return nn.functional.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v


def check_compiler(setting: str) -> None:
    """Raises ConfigError, naming the setting that asks for it, where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    check(
        shutil.which(compiler) is not None,
        f"{setting}=true needs a C++ compiler, and there is no {compiler} on this node; "
        f"install one, name it in CXX, or set {setting}=false",
    )


def compiled(network: AbstractNetwork) -> MeanVelocity:
    """u(x, t, s, label) of `network`, its weights as they are at each call; gradients to rounding.

    torch.compile inside torch.func.jvp runs uncompiled, and all later calls with it (torch 2.15.0).
    So a call with a tangent takes the network as it is. A compiled pass cannot be differentiated
    twice.

    Raises:
        ConfigError: there is no C++ compiler, which torch.compile needs.
    """
    check_compiler("train.compile")
    # Else a graph that is kept for a second pass back, as adaptive weights do, would be refused.
    torch._functorch.config.donated_buffer = False
    fast = torch.compile(network, fullgraph=True)

    def forward(
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        is_dual = any(
            torch.autograd.forward_ad.unpack_dual(value).tangent is not None for value in (x, t, s)
        )
        return (network if is_dual else fast)(x, t, s, label)

    return forward
