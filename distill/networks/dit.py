"""A diffusion transformer with SiT's parameter names, plus a branch for the second time s.

SiT (Ma et al., 2024, arXiv 2401.08740) has t = 0 noise and t = 1 data as we do, so its weights need
no conversion of time. Names: `x_embedder`, `pos_embed`, `t_embedder`, `y_embedder`, `blocks.N`,
`final_layer`; ours alone: `s_embedder`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.config import ImageSpec, check
from distill.networks import layers
from distill.networks.config import DiTConfig


def modulate(
    x: Float[Tensor, "B T W"], shift: Float[Tensor, "B W"], scale: Float[Tensor, "B W"]
) -> Float[Tensor, "B T W"]:
    """x (1 + scale) + shift, per sample."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def grid_embedding(width: int, size: int) -> Float[Tensor, "1 T W"]:
    """Fixed positions as in MAE: sin and cos of the column, then of the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis[None, :].expand(size, size, -1)
    rows = axis[:, None].expand(size, size, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, size * size, width).float()


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, row by row."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.view(width, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B T D"]:
        """[B, tokens, width]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """[B, tokens, width]."""
        return self.joined(layers.attention(*self.heads(x)))

    def heads(self, x: Float[Tensor, "B T W"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, heads, T, D]."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def joined(self, values: Float[Tensor, "B heads T D"]) -> Float[Tensor, "B T W"]:
        """The heads' output, projected."""
        return self.proj(values.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """[B, tokens, width]."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; both gates start at 0."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1: nn.Module = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, config.num_heads)
        self.norm2: nn.Module = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp: nn.Module = Mlp(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Float[Tensor, "B T W"], c: Float[Tensor, "B W"], *positions: Tensor
    ) -> Float[Tensor, "B T W"]:
        """[B, tokens, width]; `positions` are for the attention."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(
            6, dim=1
        )
        h = self.attn(modulate(self.norm1(x), shift_1, scale_1), *positions)
        x = torch.addcmul(x, gate_1[:, None], h)
        return torch.addcmul(
            x, gate_2[:, None], self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        )


class FinalLayer(nn.Module):
    """Tokens to patch pixels."""

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.norm_final: nn.Module = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Float[Tensor, "B T W"], c: Float[Tensor, "B W"]) -> Float[Tensor, "B T P"]:
        """[B, tokens, patch_size^2 * channels], channels fastest."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(layers.AbstractNetwork):
    """u(x, t, s, label) as a transformer over patches; at the start it is 0 everywhere."""

    def __init__(self, config: DiTConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        check(
            image.size % config.patch_size == 0,
            f"student.patch_size={config.patch_size} must divide the image size {image.size}",
        )
        check(config.width % 4 == 0, f"student.width={config.width} must be a multiple of 4")
        self.patch_size, self.grid = config.patch_size, image.size // config.patch_size
        self.x_embedder = PatchEmbed(image.channels, config.patch_size, config.width)
        self.t_embedder = layers.TimeEmbedder(config.width)
        self.s_embedder = layers.JumpEmbedder(config.width)
        self.y_embedder = layers.LabelEmbedder(image.num_classes, config.width)
        self.register_buffer("pos_embed", grid_embedding(config.width, self.grid))
        self._build_layers(config, image)
        self._initialize()

    def _build_layers(self, config: DiTConfig, image: ImageSpec) -> None:
        """Makes `blocks` and `final_layer`."""
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config.width, config.patch_size, image.channels)

    def _initialize(self) -> None:
        for block in [*self.blocks, self.final_layer]:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        zero = [
            block.get_submodule("adaLN_modulation.1") for block in [*self.blocks, self.final_layer]
        ]
        for layer in [*zero, self.final_layer.linear]:
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)

    @property
    def last_layer(self) -> Tensor:
        return self.final_layer.linear.weight

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, s, label) in the dtype of x; label -1 is "none"."""
        dtype = self.final_layer.linear.weight.dtype
        c = self.t_embedder(t) + self.s_embedder(s - t) + self.y_embedder(label)
        h = self.x_embedder(x.to(dtype)) + self.get_buffer("pos_embed").to(dtype)
        for block in self.blocks:
            h = self.run_block(block, h, c, *self._positions())
        return self._unpatchify(self.final_layer(h, c)).to(x.dtype)

    def _positions(self) -> tuple[Tensor, ...]:
        """What every block is given beside tokens and condition."""
        return ()

    def _unpatchify(self, h: Tensor) -> Tensor:
        """[B, tokens, p p C] -> [B, C, H, W]."""
        grid, patch = self.grid, self.patch_size
        pixels = h.view(-1, grid, grid, patch, patch, self.image.channels).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(-1, *self.image.shape)
