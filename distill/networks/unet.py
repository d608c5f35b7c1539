"""A U-Net after ADM (Dhariwal and Nichol, 2021) and DDPM++ (Song et al., 2021).

Residual blocks with group norm, SiLU and scale-shift conditioning; attention at chosen sizes; a
skip connection from every block on the way down. t, s - t and the label enter through the same
embedders as in `dit.py`.
"""

from math import gcd

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.config import ImageSpec, check
from distill.networks import layers
from distill.networks.config import UNetConfig


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with at most 32 groups of at least 4 channels."""
    return nn.GroupNorm(gcd(32, channels // 4), channels, eps=1e-5)


def zero_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution that starts as 0."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class SelfAttention(nn.Module):
    """x + attention over all pixels; starts as x."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_conv(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """[B, C, H, W]."""
        batch, _, height, width = x.shape  # not len(x), which a traced graph takes for a constant
        heads = self.qkv(self.norm(x)).reshape(batch, 3, self.num_heads, -1, height * width)
        q, k, v = heads.transpose(-1, -2).unbind(1)
        return x + self.proj(layers.attention(q, k, v).transpose(-1, -2).reshape(x.shape))


class ResidualBlock(nn.Module):
    """x plus two convolutions, the second scaled and shifted by the condition; starts as x.

    With `attention_heads` above 0, self-attention follows.
    """

    def __init__(
        self, channels: int, out_channels: int, condition: int, attention_heads: int
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_conv(out_channels, out_channels, 3)
        self.skip = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )
        self.attention = (
            SelfAttention(out_channels, attention_heads) if attention_heads else nn.Identity()
        )

    def forward(
        self, x: Float[Tensor, "B C H W"], c: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B C2 H W"]:
        """[B, out_channels, H, W]."""
        scale, shift = self.condition(c)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.attention(self.skip(x) + self.conv2(nn.functional.silu(h)))


class Upsample(nn.Module):
    """Doubles height and width: nearest pixel, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        """[B, C, 2H, 2W]."""
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(layers.AbstractNetwork):
    """u(x, t, s, label) as a U-Net; at the start it is 0 everywhere."""

    def __init__(self, config: UNetConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        factor = 2 ** (len(config.channel_mults) - 1)
        check(
            image.size % factor == 0,
            f"student.channel_mults={config.channel_mults} needs an image size that is a multiple "
            f"of {factor}, not {image.size}",
        )
        check(config.width % 4 == 0, f"student.width={config.width} must be a multiple of 4")
        condition = 4 * config.width
        self.t_embedder = layers.TimeEmbedder(condition)
        self.s_embedder = layers.JumpEmbedder(condition)
        self.y_embedder = layers.LabelEmbedder(image.num_classes, condition)
        self.stem = nn.Conv2d(image.channels, config.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = self._build_down(config, image.size, condition)
        channels = skips[-1]
        self.middle = nn.ModuleList(
            [
                ResidualBlock(channels, channels, condition, config.num_heads),
                ResidualBlock(channels, channels, condition, 0),
            ]
        )
        self._build_up(config, image.size // factor, condition, skips)
        self.norm = group_norm(config.width * config.channel_mults[0])
        self.head = zero_conv(config.width * config.channel_mults[0], image.channels, 3)

    def _build_down(self, config: UNetConfig, size: int, condition: int) -> list[int]:
        """Fills `self.down`; returns the channels of every skip connection, outermost first."""
        channels = config.width
        skips = [channels]
        for level, mult in enumerate(config.channel_mults):
            heads = config.num_heads if size in config.attention_sizes else 0
            for _ in range(config.blocks_per_level):
                self.down.append(ResidualBlock(channels, mult * config.width, condition, heads))
                channels = mult * config.width
                skips.append(channels)
            if level < len(config.channel_mults) - 1:
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
                size //= 2
        return skips

    def _build_up(self, config: UNetConfig, size: int, condition: int, skips: list[int]) -> None:
        """Fills `self.up`, the mirror of `self.down`; each block takes one skip connection."""
        skips, channels = list(skips), skips[-1]
        for level, mult in reversed(list(enumerate(config.channel_mults))):
            heads = config.num_heads if size in config.attention_sizes else 0
            for _ in range(config.blocks_per_level + 1):
                self.up.append(
                    ResidualBlock(channels + skips.pop(), mult * config.width, condition, heads)
                )
                channels = mult * config.width
            if level > 0:
                self.up.append(Upsample(channels))
                size *= 2
        assert not skips

    @property
    def last_layer(self) -> Tensor:
        return self.head.weight

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, s, label) in the dtype of x; label -1 is "none"."""
        c = nn.functional.silu(self.t_embedder(t) + self.s_embedder(s - t) + self.y_embedder(label))
        # Channels last, as convolutions like it: on tensor cores, and 6 % on a CPU (docs/log.md).
        h = self.stem(x.to(self.head.weight.dtype, memory_format=torch.channels_last))
        skips = [h]
        for module in self.down:
            h = self.run_block(module, h, c) if isinstance(module, ResidualBlock) else module(h)
            skips.append(h)
        for module in self.middle:
            h = self.run_block(module, h, c)
        for module in self.up:
            if isinstance(module, ResidualBlock):
                h = self.run_block(module, torch.cat([h, skips.pop()], dim=1), c)
            else:
                h = module(h)
        u = self.head(nn.functional.silu(self.norm(h)))
        return u.to(x.dtype, memory_format=torch.contiguous_format)
