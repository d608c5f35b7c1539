"""LightningDiT (Yao et al., 2025, arXiv 2501.01423) by its parameter names: a DiT with RMS norms,
SwiGLU and rotary positions. Its time is SiT's, ours. Ours alone: `s_embedder`.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import ImageSpec, check
from distill.networks import dit, layers
from distill.networks.config import DiTConfig, LightningDiTConfig, swiglu_width


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, times a weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
        """[*B, W]."""
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight


def rotary_angles(head_width: int, size: int) -> Float[Tensor, "T D"]:
    """Angles of the pairs of a head's features, each twice: of the row first, then of the column.

    Feature pair j of d = head_width / 4 of an axis turns by position * 10000^(-j / d).
    """
    count = head_width // 4
    omega = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    axis = (torch.arange(size, dtype=torch.float64)[:, None] * omega).repeat_interleave(2, dim=1)
    rows = axis[:, None].expand(size, size, -1)
    columns = axis[None, :].expand(size, size, -1)
    return torch.cat([rows, columns], dim=-1).reshape(size * size, 4 * count)


def rotated(
    x: Float[Tensor, "B heads T D"], cos: Float[Tensor, "T D"], sin: Float[Tensor, "T D"]
) -> Float[Tensor, "B heads T D"]:
    """Each pair (a, b) of neighbouring features turned: (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


class RotaryAttention(dit.Attention):
    """Multi-head self-attention over tokens whose queries and keys are turned by their place."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__(width, num_heads)
        head = width // num_heads
        self.q_norm = RMSNorm(head) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head) if qk_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B T W"], *positions: Tensor) -> Float[Tensor, "B T W"]:
        """[B, tokens, width]; `positions` are cos and sin of the angles."""
        cos, sin = (table.to(x.dtype) for table in positions)
        q, k, v = self.heads(x)
        q, k = rotated(self.q_norm(q), cos, sin), rotated(self.k_norm(k), cos, sin)
        return self.joined(layers.attention(q, k, v))


class SwiGLU(nn.Module):
    """w3 (silu(a) b) of the halves a, b of w12 x."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """[B, tokens, width]."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LightningDiT(dit.DiT):
    """u(x, t, s, label) as a transformer over patches; at the start it is 0 everywhere."""

    def __init__(self, config: LightningDiTConfig, image: ImageSpec) -> None:
        head = config.width // config.num_heads
        check(
            head % 4 == 0,
            f"student.width={config.width} over student.num_heads={config.num_heads} makes heads "
            f"of {head}; rotary positions need a multiple of 4",
        )
        super().__init__(config, image)
        angles = rotary_angles(head, self.grid)
        self.feat_rope = nn.Module()
        self.feat_rope.register_buffer("freqs_cos", angles.cos().float())
        self.feat_rope.register_buffer("freqs_sin", angles.sin().float())

    def _build_layers(self, config: DiTConfig, image: ImageSpec) -> None:
        super()._build_layers(config, image)
        own = cast("LightningDiTConfig", config)  # which a student outside of this package has not
        for block in self.blocks:
            assert isinstance(block, dit.Block)
            block.norm1, block.norm2 = RMSNorm(config.width), RMSNorm(config.width)
            block.attn = RotaryAttention(own.width, own.num_heads, own.qk_norm)
            block.mlp = SwiGLU(own.width, swiglu_width(own.width, own.mlp_ratio))
        self.final_layer.norm_final = RMSNorm(config.width)

    def _positions(self) -> tuple[Tensor, ...]:
        rope = self.feat_rope
        return rope.get_buffer("freqs_cos"), rope.get_buffer("freqs_sin")
