"""Parameters and multiplications of a network, by formula from its settings. Needs no torch, so a
login node can plan.

A linear layer from n to m features has n m weights and, on r rows, r n m multiplications; a k x k
convolution is one with k^2 n inputs on every pixel; attention over T tokens of width W multiplies 2
T^2 W times. One multiplication and its addition are 2 FLOP. Norms, activations and softmax are left
out of the FLOP: a few per cent.
"""

from dataclasses import dataclass

from distill.config import ConfigError, ImageSpec
from distill.networks import config as settings
from distill.networks.config import DiTConfig, EdmUNetConfig, NetworkConfig, UNetConfig

NUM_FEATURES = 256  # sinusoids of t and of s - t


@dataclass
class NetworkCost:
    """Trainable parameters, and FLOP of one forward of one sample."""

    parameters: int = 0
    flops: int = 0

    def linear(self, inputs: int, outputs: int, rows: int = 1, bias: bool = True) -> None:
        """Adds a linear layer that runs on `rows` rows."""
        self.parameters += inputs * outputs + (outputs if bias else 0)
        self.flops += 2 * rows * inputs * outputs

    def conv(self, inputs: int, outputs: int, kernel: int, pixels: int) -> None:
        """Adds a convolution with `pixels` output pixels."""
        self.linear(kernel * kernel * inputs, outputs, rows=pixels)

    def resample(self, weights: list[float], channels: int, pixels: int) -> None:
        """Adds a fixed filter that halves or doubles a map; `pixels` of the smaller one."""
        self.flops += 2 * len(weights) ** 2 * channels * pixels

    def norm(self, channels: int) -> None:
        """Adds a norm with scale and shift."""
        self.parameters += 2 * channels

    def jump_embedder(self, width: int) -> None:
        """Adds the embedder of s - t, which has no bias."""
        self.linear(NUM_FEATURES, width, bias=False)
        self.linear(width, width, bias=False)

    def attention(self, tokens: int, width: int) -> None:
        """Adds q k^T and the weighted sum of v."""
        self.flops += 4 * tokens * tokens * width

    def embedders(self, width: int, num_classes: int) -> None:
        """Adds the embedders of t (with bias), of s - t (without) and of the label (with a row for
        "none").
        """
        self.linear(NUM_FEATURES, width)
        self.linear(width, width)
        self.jump_embedder(width)
        self.parameters += (num_classes + 1) * width


def network_cost(config: NetworkConfig, image: ImageSpec) -> NetworkCost:
    """Cost of the network that `distill.networks.build.build_network` makes of these settings.

    Raises:
        ConfigError: a network that is not known here.
    """
    match config:
        case settings.DiTConfig():
            return _dit(config, image)
        case settings.UNetConfig():
            return _unet(config, image)
        case settings.EdmUNetConfig():
            return _edm_unet(config, image)
        case settings.Edm2UNetConfig():
            return _edm2_unet(config, image)
    raise ConfigError(f"student={type(config).__name__} is not a known network")


def _dit(config: DiTConfig, image: ImageSpec) -> NetworkCost:
    cost, width = NetworkCost(), config.width
    tokens = (image.size // config.patch_size) ** 2
    hidden = int(width * config.mlp_ratio)
    pixels = config.patch_size**2 * image.channels
    cost.linear(pixels, width, tokens)
    cost.embedders(width, image.num_classes)
    lightning = config if isinstance(config, settings.LightningDiTConfig) else None
    if lightning:
        cost.parameters += (2 * config.depth + 1) * width  # norms
        if lightning.qk_norm:
            cost.parameters += 2 * config.depth * width // config.num_heads
    for _ in range(config.depth):
        cost.linear(width, 3 * width, tokens)
        cost.attention(tokens, width)
        cost.linear(width, width, tokens)
        if lightning:
            inner = settings.swiglu_width(width, config.mlp_ratio)
            cost.linear(width, 2 * inner, tokens)
            cost.linear(inner, width, tokens)
        else:
            cost.linear(width, hidden, tokens)
            cost.linear(hidden, width, tokens)
        cost.linear(width, 6 * width)
    cost.linear(width, 2 * width)
    cost.linear(width, pixels, tokens)
    return cost


def _unet(config: UNetConfig, image: ImageSpec) -> NetworkCost:
    cost, width, size = NetworkCost(), config.width, image.size
    cost.embedders(4 * width, image.num_classes)
    cost.conv(image.channels, width, 3, size * size)
    channels, skips = width, [width]
    last = len(config.channel_mults) - 1
    for level, mult in enumerate(config.channel_mults):
        for _ in range(config.blocks_per_level):
            _residual(cost, config, channels, mult * width, size, size in config.attention_sizes)
            channels = mult * width
            skips.append(channels)
        if level < last:
            size //= 2
            cost.conv(channels, channels, 3, size * size)
            skips.append(channels)
    _residual(cost, config, channels, channels, size, True)
    _residual(cost, config, channels, channels, size, False)
    for level in range(last, -1, -1):
        outputs = config.channel_mults[level] * width
        for _ in range(config.blocks_per_level + 1):
            _residual(
                cost, config, channels + skips.pop(), outputs, size, size in config.attention_sizes
            )
            channels = outputs
        if level > 0:
            size *= 2
            cost.conv(channels, channels, 3, size * size)
    cost.norm(channels)
    cost.conv(channels, image.channels, 3, size * size)
    return cost


def _residual(
    cost: NetworkCost, config: UNetConfig, inputs: int, outputs: int, size: int, attends: bool
) -> None:
    """A residual block with its condition and, where it attends, its attention."""
    pixels = size * size
    cost.norm(inputs)
    cost.conv(inputs, outputs, 3, pixels)
    cost.linear(4 * config.width, 2 * outputs)
    cost.norm(outputs)
    cost.conv(outputs, outputs, 3, pixels)
    if inputs != outputs:
        cost.conv(inputs, outputs, 1, pixels)
    if attends:
        cost.norm(outputs)
        cost.conv(outputs, 3 * outputs, 1, pixels)
        cost.attention(pixels, outputs)
        cost.conv(outputs, outputs, 1, pixels)


def _edm_unet(config: EdmUNetConfig, image: ImageSpec) -> NetworkCost:
    cost, width, is_song = NetworkCost(), config.width, config.family == "song"
    features, condition = config.noise_mult * width, config.condition_mult * width
    cost.linear(features, condition)
    cost.linear(condition, condition)
    cost.jump_embedder(condition)
    if image.num_classes:
        cost.linear(image.num_classes, features if is_song else condition, bias=is_song)
    size, channels = image.size, width * (1 if is_song else config.channel_mults[0])
    extra, skips = image.channels, [channels]
    cost.conv(image.channels, channels, 3, size * size)
    for level, mult in enumerate(config.channel_mults):
        if level > 0:
            size //= 2
            _edm_block(cost, config, channels, channels, size, way="down")
            skips.append(channels)
            if config.encoder == "skip":
                cost.resample(config.filter, extra, size * size)
                cost.conv(extra, channels, 1, size * size)
            elif config.encoder == "residual":  # its filter comes last
                cost.conv(extra, channels, 3, (2 * size + len(config.filter) - 2) ** 2)
                cost.resample(config.filter, channels, size * size)
                extra = channels
        for _ in range(config.blocks_per_level):
            attends = size in config.attention_sizes
            _edm_block(cost, config, channels, mult * width, size, attends)
            channels = mult * width
            skips.append(channels)
    _edm_block(cost, config, channels, channels, size, True)
    _edm_block(cost, config, channels, channels, size)
    for level in range(len(config.channel_mults) - 1, -1, -1):
        if level < len(config.channel_mults) - 1:
            size *= 2
            _edm_block(cost, config, channels, channels, size, way="up")
        for index in range(config.blocks_per_level + 1):
            is_last = index == config.blocks_per_level
            attends = size in config.attention_sizes and (is_last or not is_song)
            outputs = config.channel_mults[level] * width
            _edm_block(cost, config, channels + skips.pop(), outputs, size, attends)
            channels = outputs
        if level == 0 or (is_song and config.decoder == "skip"):
            if size > image.size >> (len(config.channel_mults) - 1) and config.decoder == "skip":
                cost.resample(config.filter, image.channels, size * size // 4)
            cost.norm(channels)
            cost.conv(channels, image.channels, 3, size * size)
    return cost


def _edm_block(
    cost: NetworkCost,
    config: EdmUNetConfig,
    inputs: int,
    outputs: int,
    size: int,
    attends: bool = False,
    way: str = "",
) -> None:
    """A block of the U-Nets of EDM, whose output has `size`."""
    pixels, is_song = size * size, config.family == "song"
    for _ in ("layers", "skip") if way else ():
        cost.resample(config.filter, inputs, pixels // 4 if way == "up" else pixels)
    cost.norm(inputs)
    cost.conv(inputs, outputs, 3, pixels)
    cost.linear(config.condition_mult * config.width, outputs * (1 if is_song else 2))
    cost.norm(outputs)
    cost.conv(outputs, outputs, 3, pixels)
    if inputs != outputs or (way and is_song):
        cost.conv(inputs, outputs, 1, pixels)
    if attends:
        cost.norm(outputs)
        cost.conv(outputs, 3 * outputs, 1, pixels)
        cost.attention(pixels, outputs)
        cost.conv(outputs, outputs, 1, pixels)


def _edm2_unet(config: settings.Edm2UNetConfig, image: ImageSpec) -> NetworkCost:
    cost, size = NetworkCost(), image.size
    first = config.width * config.channel_mults[0]
    condition = config.width * max(config.channel_mults)
    cost.linear(first, condition, bias=False)
    cost.linear(image.num_classes, condition, bias=False)
    cost.jump_embedder(condition)
    _edm2_conv(cost, image.channels + 1, first, 3, size)
    channels, skips = first, [first]
    for level, mult in enumerate(config.channel_mults):
        if level > 0:
            size //= 2
            cost.resample([1.0, 1.0], channels, size * size)
            _edm2_block(cost, config, channels, channels, channels, size)
            skips.append(channels)
        for _ in range(config.blocks_per_level):
            outputs, attends = mult * config.width, size in config.attention_sizes
            _edm2_block(cost, config, channels, outputs, outputs, size, attends)
            channels = outputs
            skips.append(channels)
    _edm2_block(cost, config, channels, channels, channels, size, True)
    _edm2_block(cost, config, channels, channels, channels, size)
    for level, mult in reversed(list(enumerate(config.channel_mults))):
        if level < len(config.channel_mults) - 1:
            cost.resample([1.0, 1.0], channels, size * size)
            size *= 2
            _edm2_block(cost, config, channels, channels, channels, size)
        for _ in range(config.blocks_per_level + 1):
            inputs, outputs = channels + skips.pop(), mult * config.width
            attends = size in config.attention_sizes
            _edm2_block(cost, config, inputs, inputs, outputs, size, attends)
            channels = outputs
    _edm2_conv(cost, channels, image.channels, 3, size)
    cost.parameters += 1  # a gain
    return cost


def _edm2_conv(cost: NetworkCost, inputs: int, outputs: int, kernel: int, size: int) -> None:
    cost.linear(kernel**2 * inputs, outputs, size * size, bias=False)


def _edm2_block(
    cost: NetworkCost,
    config: settings.Edm2UNetConfig,
    inputs: int,
    inner: int,
    outputs: int,
    size: int,
    attends: bool = False,
) -> None:
    """A block of EDM2, whose first convolution has `inner` inputs."""
    _edm2_conv(cost, inner, outputs, 3, size)
    cost.linear(config.width * max(config.channel_mults), outputs, bias=False)
    _edm2_conv(cost, outputs, outputs, 3, size)
    if inputs != outputs:
        _edm2_conv(cost, inputs, outputs, 1, size)
    if attends and outputs >= 64:
        _edm2_conv(cost, outputs, 3 * outputs, 1, size)
        cost.attention(size * size, outputs)
        _edm2_conv(cost, outputs, outputs, 1, size)
    cost.parameters += 1  # a gain
