"""The U-Nets of EDM's public code (Karras et al., 2022), plus a branch for the jump s - t.

`family=song` is DDPM++ and NCSN++ (Song et al., 2021), `family=adm` the U-Net of Dhariwal and
Nichol (2021). Names are EDM's: `map_*` for the condition, `enc.16x16_block0`, `dec.16x16_up`;
ours alone: `s_embedder`. Labels for data augmentation are taken as 0 and have no layer.

Let F(x, c) be the layers. With `time=flow` they are a velocity field asked for 999 t, as
score_sde's networks are by RectifiedFlow: u = F(x, 999 t), of which `embedding=fourier` takes the
logarithm. With `time=edm` they are EDM's denoiser. It takes y = x_1 + sigma x_0, which is x_t / t
for sigma = (1 - t) / t, and since E[x_1 - x_0 | x_t] = (D - x_t) / (1 - t), with d = sigma_data
and n^2 = (1-t)^2 + t^2 d^2,

    D(y, sigma) = c_skip y + c_out F(c_in y, ln(sigma) / 4)
    u = (t d^2 - (1-t)) / n^2 x_t + d/n F(x_t / n, ln(sigma) / 4),

which is finite at both ends but for ln(sigma): there sigma stays within SIGMA_RANGE.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import ImageSpec, check
from distill.flow.paths import expand_as
from distill.networks import layers
from distill.networks.config import EdmUNetConfig

SIGMA_RANGE = (0.002, 80.0)  # that EDM samples over
FIRST_T = 1e-3  # below it the logarithm of the time stands still


def of_denoiser(
    raw: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B C H W"],
    t: Float[Tensor, "B"],
    sigma_data: float,
    sigma_range: tuple[float, float] = SIGMA_RANGE,
) -> Float[Tensor, "B C H W"]:
    """v(x, t) of a denoiser with EDM's preconditioning of F, `raw` of (c_in y, c_noise)."""
    d = sigma_data
    n = ((1 - t) ** 2 + t**2 * d**2).sqrt()
    sigma = ((1 - t) / t.clamp_min(1e-12)).clamp(*sigma_range)
    linear = (t * d**2 - (1 - t)) / n**2
    out = raw(x / expand_as(n, x), sigma.log() / 4)
    return expand_as(linear, x) * x + expand_as(d / n, x) * out


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group norm with at most 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Resample(nn.Module):
    """Half or double the height and width, by a separable filter of 2 or 4 weights."""

    def __init__(self, way: str, weights: list[float]) -> None:
        super().__init__()
        self.way, self.padding = way, (len(weights) - 1) // 2
        line = torch.tensor(weights, dtype=torch.float64)
        table = torch.outer(line, line) / line.sum() ** 2
        self.register_buffer("table", table.float()[None, None], persistent=False)

    def forward(self, x: Float[Tensor, "B C H W"], padding: int | None = None) -> Tensor:
        """[B, C, 2H, 2W] or [B, C, H/2, W/2]; `padding` other than the filter's if given."""
        channels = x.shape[1]
        table = self.get_buffer("table").to(x.dtype).expand(channels, 1, -1, -1)
        if self.way == "up":
            return F.conv_transpose2d(x, 4 * table, groups=channels, stride=2, padding=self.padding)
        padding = self.padding if padding is None else padding
        return F.conv2d(x, table, groups=channels, stride=2, padding=padding)


class Conv(nn.Conv2d):
    """A convolution that keeps the size, after a `Resample` where one is given.

    With `filter_last` the order is turned round, on a border so wide that only rounding differs
    from a filter before it that knows no border.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        resample: Resample | None = None,
        filter_last: bool = False,
    ) -> None:
        border = resample.padding if resample and filter_last else 0
        super().__init__(inputs, outputs, kernel, padding=kernel // 2 + border)
        self.resample, self.filter_last = resample, filter_last
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, input: Float[Tensor, "B C H W"]) -> Tensor:
        """[B, outputs, H, W], or of the resampled size."""
        if self.resample is None:
            return super().forward(input)
        if not self.filter_last:
            return super().forward(self.resample(input))
        h = F.conv2d(input, self.weight, padding=self.padding)
        assert self.bias is not None
        return self.resample(h, padding=0) + self.bias[:, None, None]


def zeroed(conv: Conv) -> Conv:
    """`conv`, which starts as 0."""
    nn.init.zeros_(conv.weight)
    return conv


class Fixed(nn.Module):
    """Buffers that stay float32 in a network of another dtype: in 16 bits the angles that
    frequencies make would be off by a radian.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fixed":
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(self.get_buffer(name).device))
        return self


class Frequencies(Fixed):
    """Fixed random frequencies, of standard deviation 16, the same whenever they are made."""

    def __init__(self, count: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("freqs", 16 * torch.randn(count, generator=draw))


class Block(nn.Module):
    """x plus two convolutions under the condition, then attention where `num_heads` is above 0.

    song: (skip(x) + h) / sqrt(2), and the condition is added; adm: it scales and shifts.
    """

    def __init__(
        self, config: EdmUNetConfig, inputs: int, outputs: int, attends: bool = False, way: str = ""
    ) -> None:
        super().__init__()
        is_song = config.family == "song"
        eps = 1e-6 if is_song else 1e-5
        self.in_channels, self.out_channels, self.scales = inputs, outputs, not is_song
        self.num_heads = 0 if not attends else 1 if is_song else outputs // 64
        self.factor = math.sqrt(0.5) if is_song else 1.0
        condition = config.condition_mult * config.width
        resample = [Resample(way, config.filter) if way else None for _ in range(2)]
        self.norm0 = group_norm(inputs, eps)
        self.conv0 = Conv(inputs, outputs, 3, resample[0])
        self.affine = nn.Linear(condition, outputs * (2 if self.scales else 1))
        self.norm1 = group_norm(outputs, eps)
        self.conv1 = zeroed(Conv(outputs, outputs, 3))
        self.skip: nn.Module | None = resample[1]
        if inputs != outputs or (way and is_song):
            self.skip = Conv(inputs, outputs, 1, resample[1])
        if self.num_heads:
            self.norm2 = group_norm(outputs, eps)
            self.qkv = Conv(outputs, 3 * outputs, 1)
            self.proj = zeroed(Conv(outputs, outputs, 1))

    def forward(self, x: Float[Tensor, "B C H W"], c: Float[Tensor, "B E"]) -> Tensor:
        """[B, out_channels, H2, W2]."""
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(c)[:, :, None, None]
        if self.scales:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + condition)
        h = self.conv1(F.silu(h))
        x = ((x if self.skip is None else self.skip(x)) + h) * self.factor
        if self.num_heads == 0:
            return x
        # EDM's order of the channels: head, feature, then q, k or v.
        pixels = x.shape[2] * x.shape[3]
        heads = self.qkv(self.norm2(x)).reshape(len(x), self.num_heads, -1, 3, pixels)
        q, k, v = heads.transpose(2, 4).unbind(3)
        a = layers.attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return (self.proj(a) + x) * self.factor


class EdmUNet(layers.AbstractNetwork):
    """u(x, t, s, label); the layers F are 0 everywhere at the start."""

    def __init__(self, config: EdmUNetConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.config: EdmUNetConfig = config
        factor = 2 ** (len(config.channel_mults) - 1)
        check(
            image.size % factor == 0,
            f"student.channel_mults={config.channel_mults} needs an image size that is a multiple "
            f"of {factor}, not {image.size}",
        )
        self.is_song, self.is_edm = config.family == "song", config.time == "edm"
        self.features = config.noise_mult * config.width
        condition = config.condition_mult * config.width
        if config.embedding == "fourier":
            self.map_noise = Frequencies(self.features // 2)
        self.map_layer0 = nn.Linear(self.features, condition)
        self.map_layer1 = nn.Linear(condition, condition)
        if image.num_classes:
            width = self.features if self.is_song else condition
            self.map_label = nn.Linear(image.num_classes, width, bias=self.is_song)
        self.s_embedder = layers.JumpEmbedder(condition)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips = self._build_encoder(config, image)
        self._build_decoder(config, image, skips)
        if not self.is_song:
            self.out_norm = group_norm(config.width * config.channel_mults[0], 1e-5)
            channels = config.width * config.channel_mults[0]
            self.out_conv = zeroed(Conv(channels, image.channels, 3))

    def _build_encoder(self, config: EdmUNetConfig, image: ImageSpec) -> list[int]:
        """Fills `enc`; the channels of every skip connection, outermost first."""
        channels = config.width if self.is_song else config.width * config.channel_mults[0]
        self.enc[f"{image.size}x{image.size}_conv"] = Conv(image.channels, channels, 3)
        skips, extra = [channels], image.channels
        for level, mult in enumerate(config.channel_mults):
            size = image.size >> level
            at = f"{size}x{size}"
            if level > 0:
                self.enc[f"{at}_down"] = Block(config, channels, channels, way="down")
                skips.append(channels)
                down = Resample("down", config.filter)
                if config.encoder == "skip":
                    self.enc[f"{at}_aux_down"] = down
                    self.enc[f"{at}_aux_skip"] = Conv(extra, channels, 1)
                elif config.encoder == "residual":
                    self.enc[f"{at}_aux_residual"] = Conv(extra, channels, 3, down, True)
                    extra = channels
            for index in range(config.blocks_per_level):
                attends = size in config.attention_sizes
                self.enc[f"{at}_block{index}"] = Block(
                    config, channels, mult * config.width, attends
                )
                channels = mult * config.width
                skips.append(channels)
        return skips

    def _build_decoder(self, config: EdmUNetConfig, image: ImageSpec, skips: list[int]) -> None:
        """Fills `dec`, whose blocks take one skip connection each."""
        skips, channels = list(skips), skips[-1]
        last = len(config.channel_mults) - 1
        for level in range(last, -1, -1):
            size = image.size >> level
            at = f"{size}x{size}"
            if level == last:
                self.dec[f"{at}_in0"] = Block(config, channels, channels, True)
                self.dec[f"{at}_in1"] = Block(config, channels, channels)
            else:
                self.dec[f"{at}_up"] = Block(config, channels, channels, way="up")
            for index in range(config.blocks_per_level + 1):
                is_last = index == config.blocks_per_level
                attends = size in config.attention_sizes and (is_last or not self.is_song)
                outputs = config.channel_mults[level] * config.width
                inputs = channels + skips.pop()
                self.dec[f"{at}_block{index}"] = Block(config, inputs, outputs, attends)
                channels = outputs
            if self.is_song and (config.decoder == "skip" or level == 0):
                if config.decoder == "skip" and level < last:
                    self.dec[f"{at}_aux_up"] = Resample("up", config.filter)
                self.dec[f"{at}_aux_norm"] = group_norm(channels, 1e-6)
                self.dec[f"{at}_aux_conv"] = zeroed(Conv(channels, image.channels, 3))
        assert not skips

    @property
    def last_layer(self) -> Tensor:
        if not self.is_song:
            return self.out_conv.weight
        return self.get_parameter(f"dec.{self.image.size}x{self.image.size}_aux_conv.weight")

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, s, label) in the dtype of x; label -1 is "none"."""
        jump = self.s_embedder(s - t)
        if not self.is_edm:
            is_fourier = self.config.embedding == "fourier"
            time = (999 * t.clamp_min(FIRST_T)).log() if is_fourier else 999 * t
            return self._layers(x, self._condition(time, jump, label))

        def raw(x_in: Tensor, c_noise: Tensor) -> Tensor:
            return self._layers(x_in, self._condition(c_noise, jump, label))

        return of_denoiser(raw, x, t, self.config.sigma_data)

    def _condition(
        self, time: Float[Tensor, "B"], jump: Float[Tensor, "B E"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B E"]:
        """What every block is given, of the time as the layers know it."""
        dtype = self.map_layer0.weight.dtype
        classes = None
        if self.image.num_classes:
            numbers = torch.arange(self.image.num_classes, device=label.device)
            classes = (label[:, None] == numbers).to(dtype)  # "none" is a row of zeros
        c = self._features(time).to(dtype)
        if self.is_song and classes is not None:
            c = c + self.map_label(classes * math.sqrt(self.image.num_classes))
        c = self.map_layer1(F.silu(self.map_layer0(c)))
        if not self.is_song and classes is not None:
            c = c + self.map_label(classes)
        return F.silu(c + jump)

    def _features(self, time: Float[Tensor, "B"]) -> Float[Tensor, "B N"]:
        """Sines, then cosines (song), or the other way round, of the time."""
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        half = self.features // 2
        if self.config.embedding == "fourier":
            frequencies = 2 * math.pi * self.map_noise.get_buffer("freqs").to(time.dtype)
        else:
            steps = torch.arange(half, dtype=time.dtype, device=time.device)
            # As score_sde rounds them: at angles of hundreds the last bit shows.
            rate = -math.log(10000) / (half - 1 if self.is_song else half)
            frequencies = torch.exp(steps * rate)
        angles = time[:, None] * frequencies
        parts = [angles.sin(), angles.cos()]
        return torch.cat(parts if self.is_song else parts[::-1], dim=1)

    def _layers(
        self, x: Float[Tensor, "B C H W"], c: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B C H W"]:
        """F under the condition, in the dtype of x."""
        # Channels last, as convolutions like it.
        h = x.to(self.last_layer.dtype, memory_format=torch.channels_last)
        extra, skips = h, list[Tensor]()
        for name, module in self.enc.items():
            if name.endswith("aux_down"):
                extra = module(extra)
            elif name.endswith("aux_skip"):
                h = skips[-1] = h + module(extra)
            elif name.endswith("aux_residual"):
                h = skips[-1] = extra = (h + module(extra)) * math.sqrt(0.5)
            else:
                h = self.run_block(module, h, c) if isinstance(module, Block) else module(h)
                skips.append(h)
        out: Tensor | None = None
        for name, module in self.dec.items():
            if name.endswith("aux_up"):
                out = module(out)
            elif name.endswith("aux_norm"):
                normed = module(h)
            elif name.endswith("aux_conv"):
                part = module(F.silu(normed))
                out = part if out is None else out + part
            else:
                assert isinstance(module, Block)
                if h.shape[1] != module.in_channels:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = self.run_block(module, h, c)
        if not self.is_song:
            out = self.out_conv(F.silu(self.out_norm(h)))
        assert out is not None
        return out.to(x.dtype, memory_format=torch.contiguous_format)
