"""EDM2's U-Net (Karras et al., 2024), plus a branch for the jump s - t.

Every layer keeps magnitudes: its weights are used with norm 1 per output, sums and concatenations
are divided by what they add, and gains are learned where something is to grow. Names are EDM2's:
`emb_*` for the condition, `enc.16x16_block0`, `dec.16x16_up`; ours alone: `s_embedder`.

    F = layers(c_in y, ln(sigma) / 4),    u as in `distill.networks.edm_unet` for its denoiser

EDM2's trainer also puts the stored weights back to norm 1 after every step. Here they are left as
they are: the output does not feel their norm, only the size of a step relative to it does.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import ImageSpec, check
from distill.networks import layers
from distill.networks.config import Edm2UNetConfig
from distill.networks.edm_unet import Fixed, Resample, of_denoiser

CLIP = 256.0  # of activations
HEAD = 64  # channels of an attention head
# How much of the second of two summands is taken.
LABEL = 0.5
RESIDUAL = 0.3
CONCAT = 0.5


def normalized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`x` over its root mean square along `dims`, added up in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    norm = 1e-4 + norm * math.sqrt(norm.numel() / x.numel())
    return x / norm.to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596: of unit magnitude for unit normal x."""
    return F.silu(x) / 0.596


def mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, of the magnitude of both if they are independent."""
    return a.lerp(b, share) / math.sqrt((1 - share) ** 2 + share**2)


def concatenated(a: Tensor, b: Tensor) -> Tensor:
    """Both, along channels, each with as much to say as `CONCAT` gives it."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - CONCAT) ** 2 + CONCAT**2))
    parts = [a * (scale * (1 - CONCAT) / math.sqrt(n_a)), b * (scale * CONCAT / math.sqrt(n_b))]
    return torch.cat(parts, dim=1)


def condition_of(config: Edm2UNetConfig) -> int:
    """Channels of the condition."""
    return config.width * max(config.channel_mults)


def gain() -> nn.Parameter:
    """A learned factor, 0 at the start. It has an axis: DeepSpeed takes no weight without one."""
    return nn.Parameter(nn.init.zeros_(torch.empty(1)))


class Layer(nn.Module):
    """A linear layer, or a convolution that keeps the size, without bias and of normed weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0) -> None:
        super().__init__()
        size = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *size))
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[B, outputs, ..] in the dtype of x."""
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        w = normalized(w, tuple(range(1, w.ndim))) * (gain / math.sqrt(w[0].numel()))
        w = w.to(x.dtype)
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Frequencies(Fixed):
    """sqrt(2) cos(w t + p) of fixed random w and p."""

    def __init__(self, count: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("freqs", 2 * math.pi * torch.randn(count, generator=draw))
        self.register_buffer("phases", 2 * math.pi * torch.rand(count, generator=draw))

    def forward(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B N"]:
        """The features of a time."""
        freqs, phases = self.get_buffer("freqs"), self.get_buffer("phases")
        return torch.cos(t[:, None] * freqs.to(t.dtype) + phases.to(t.dtype)) * math.sqrt(2)


class Block(nn.Module):
    """x and two convolutions under the condition, mixed; then attention where it is asked for."""

    def __init__(
        self,
        config: Edm2UNetConfig,
        inputs: int,
        outputs: int,
        is_encoder: bool,
        attends: bool = False,
        way: str = "",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.is_encoder = inputs, outputs, is_encoder
        self.num_heads = outputs // HEAD if attends else 0
        self.resample = Resample(way, [1.0, 1.0]) if way else None
        self.emb_gain = gain()
        self.conv_res0 = Layer(outputs if is_encoder else inputs, outputs, 3)
        self.emb_linear = Layer(condition_of(config), outputs)
        self.conv_res1 = Layer(outputs, outputs, 3)
        self.conv_skip = Layer(inputs, outputs, 1) if inputs != outputs else None
        if self.num_heads:
            self.attn_qkv = Layer(outputs, 3 * outputs, 1)
            self.attn_proj = Layer(outputs, outputs, 1)

    def forward(self, x: Float[Tensor, "B C H W"], c: Float[Tensor, "B E"]) -> Tensor:
        """[B, out_channels, H2, W2]."""
        if self.resample is not None:
            x = self.resample(x)
        if self.is_encoder:
            x = normalized(x if self.conv_skip is None else self.conv_skip(x), (1,))
        scale = self.emb_linear(c, self.emb_gain)[:, :, None, None] + 1
        h = self.conv_res1(silu(self.conv_res0(silu(x)) * scale.to(x.dtype)))
        if not self.is_encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mixed(x, h, RESIDUAL)
        if self.num_heads:
            # EDM's order of the channels: head, feature, then q, k or v.
            heads = self.attn_qkv(x).reshape(len(x), self.num_heads, HEAD, 3, -1)
            q, k, v = normalized(heads, (2,)).transpose(2, 4).unbind(3)
            a = layers.attention(q, k, v).transpose(-1, -2).reshape(x.shape)
            x = mixed(x, self.attn_proj(a), RESIDUAL)
        return x.clamp(-CLIP, CLIP)


class Edm2UNet(layers.AbstractNetwork):
    """u(x, t, s, label); the layers F are 0 everywhere at the start."""

    def __init__(self, config: Edm2UNetConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.config: Edm2UNetConfig = config
        factor = 2 ** (len(config.channel_mults) - 1)
        check(
            image.size % factor == 0,
            f"student.channel_mults={config.channel_mults} needs an image size that is a multiple "
            f"of {factor}, not {image.size}",
        )
        self.emb_fourier = Frequencies(config.width * config.channel_mults[0])
        self.emb_noise = Layer(config.width * config.channel_mults[0], condition_of(config))
        if image.num_classes:
            self.emb_label = Layer(image.num_classes, condition_of(config))
        self.s_embedder = layers.JumpEmbedder(condition_of(config))
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips = self._build_encoder(config, image)
        self._build_decoder(config, image, skips)
        self.out_conv = Layer(config.width * config.channel_mults[0], image.channels, 3)
        self.out_gain = gain()

    def _build_encoder(self, config: Edm2UNetConfig, image: ImageSpec) -> list[int]:
        """Fills `enc`; the channels of every skip connection, outermost first."""
        channels, skips = image.channels + 1, list[int]()  # and one of ones, for a bias
        for level, mult in enumerate(config.channel_mults):
            size, outputs = image.size >> level, mult * config.width
            at = f"{size}x{size}"
            if level == 0:
                self.enc[f"{at}_conv"] = Layer(channels, outputs, 3)
                channels = outputs
            else:
                self.enc[f"{at}_down"] = Block(config, channels, channels, True, way="down")
            skips.append(channels)
            for index in range(config.blocks_per_level):
                attends = size in config.attention_sizes
                self.enc[f"{at}_block{index}"] = Block(config, channels, outputs, True, attends)
                channels = outputs
                skips.append(channels)
        return skips

    def _build_decoder(self, config: Edm2UNetConfig, image: ImageSpec, skips: list[int]) -> None:
        """Fills `dec`, whose blocks take one skip connection each."""
        skips, channels = list(skips), skips[-1]
        last = len(config.channel_mults) - 1
        for level in range(last, -1, -1):
            size, outputs = image.size >> level, config.channel_mults[level] * config.width
            at = f"{size}x{size}"
            if level == last:
                self.dec[f"{at}_in0"] = Block(config, channels, channels, False, True)
                self.dec[f"{at}_in1"] = Block(config, channels, channels, False)
            else:
                self.dec[f"{at}_up"] = Block(config, channels, channels, False, way="up")
            for index in range(config.blocks_per_level + 1):
                attends = size in config.attention_sizes
                inputs = channels + skips.pop()
                self.dec[f"{at}_block{index}"] = Block(config, inputs, outputs, False, attends)
                channels = outputs
        assert not skips

    @property
    def last_layer(self) -> Tensor:
        return self.out_conv.weight

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, s, label) in the dtype of x; label -1 is "none"."""

        def raw(x_in: Tensor, c_noise: Tensor) -> Tensor:
            return self._layers(x_in, self._condition(c_noise, s - t, label))

        return of_denoiser(raw, x, t, self.config.sigma_data)

    def _condition(
        self, c_noise: Float[Tensor, "B"], jump: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B E"]:
        """What every block is given."""
        c_noise = c_noise.to(torch.promote_types(c_noise.dtype, torch.float32))
        c = self.emb_noise(self.emb_fourier(c_noise).to(self.out_conv.weight.dtype))
        if classes := self.image.num_classes:
            numbers = torch.arange(classes, device=label.device)
            rows = (label[:, None] == numbers).to(c.dtype)  # "none" is a row of zeros
            c = mixed(c, self.emb_label(rows * math.sqrt(classes)), LABEL)
        return silu(c + self.s_embedder(jump))

    def _layers(
        self, x: Float[Tensor, "B C H W"], c: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B C H W"]:
        """F under the condition, in the dtype of x."""
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        h = h.to(self.out_conv.weight.dtype, memory_format=torch.channels_last)
        skips = list[Tensor]()
        for module in self.enc.values():
            h = self.run_block(module, h, c) if isinstance(module, Block) else module(h)
            skips.append(h)
        for module in self.dec.values():
            assert isinstance(module, Block)
            if h.shape[1] != module.in_channels:
                h = concatenated(h, skips.pop())
            h = self.run_block(module, h, c)
        out = self.out_conv(h, self.out_gain)
        return out.to(x.dtype, memory_format=torch.contiguous_format)
