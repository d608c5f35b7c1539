"""Parameters and multiplications of a network, by formula from its settings. Needs no torch, so a
login node can plan.

A linear layer from n to m features has n m weights and, on r rows, r n m multiplications; a k x k
convolution is one with k^2 n inputs on every pixel; attention over T tokens of width W multiplies 2
T^2 W times. One multiplication and its addition are 2 FLOP. Norms, activations and softmax are left
out of the FLOP: a few per cent.
"""

from dataclasses import dataclass

from distill.config import ConfigError, ImageSpec
from distill.networks.config import DiTConfig, NetworkConfig, UNetConfig

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

    def norm(self, channels: int) -> None:
        """Adds a norm with scale and shift."""
        self.parameters += 2 * channels

    def attention(self, tokens: int, width: int) -> None:
        """Adds q k^T and the weighted sum of v."""
        self.flops += 4 * tokens * tokens * width

    def embedders(self, width: int, num_classes: int) -> None:
        """Adds the embedders of t (with bias), of s - t (without) and of the label (with a row for
        "none").
        """
        for bias in (True, False):
            self.linear(NUM_FEATURES, width, bias=bias)
            self.linear(width, width, bias=bias)
        self.parameters += (num_classes + 1) * width


def network_cost(config: NetworkConfig, image: ImageSpec) -> NetworkCost:
    """Cost of the network that `distill.networks.build.build_network` makes of these settings.

    Raises:
        ConfigError: a network that is not known here.
    """
    match config:
        case DiTConfig():
            return _dit(config, image)
        case UNetConfig():
            return _unet(config, image)
    raise ConfigError(f"student={type(config).__name__} is not a known network")


def _dit(config: DiTConfig, image: ImageSpec) -> NetworkCost:
    cost, width = NetworkCost(), config.width
    tokens = (image.size // config.patch_size) ** 2
    hidden = int(width * config.mlp_ratio)
    pixels = config.patch_size**2 * image.channels
    cost.linear(pixels, width, tokens)
    cost.embedders(width, image.num_classes)
    for _ in range(config.depth):
        cost.linear(width, 3 * width, tokens)
        cost.attention(tokens, width)
        cost.linear(width, width, tokens)
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
