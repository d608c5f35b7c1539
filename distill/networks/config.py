"""Settings of the networks, one dataclass each. No torch."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from omegaconf import MISSING

from distill.config import check, check_choice, check_positive, lacking


@dataclass
class NetworkConfig:
    """Base of the network variants; one subclass per architecture."""

    name: str = MISSING  # a row of NETWORKS

    # Settings that change what the network computes and that no weight's shape shows.
    not_in_shapes: ClassVar[tuple[str, ...]] = ()

    def shallowest(self) -> "NetworkConfig":
        """The same with the fewest blocks. What the constructor makes before them stays the same.

        `distill.networks.files.load_weights` takes from it what a file of weights leaves out.
        """
        return self


@dataclass
class DiTConfig(NetworkConfig):
    """Diffusion transformer with SiT's parameter names (Ma et al., 2024)."""

    name: str = "dit"
    patch_size: int = 2  # pixels of a patch's side
    width: int = 384  # channels of a patch
    depth: int = 12  # blocks
    num_heads: int = 6  # of attention
    mlp_ratio: float = 4.0  # channels inside an MLP, over `width`

    not_in_shapes = ("num_heads",)

    def shallowest(self) -> "DiTConfig":
        """The same with one block."""
        return replace(self, depth=1)

    def __post_init__(self) -> None:
        check_positive("student", patch_size=self.patch_size, width=self.width)
        check_positive("student", depth=self.depth, num_heads=self.num_heads)
        check(
            self.width % self.num_heads == 0,
            f"student.width={self.width} must be a multiple of student.num_heads={self.num_heads}",
        )


@dataclass
class UNetConfig(NetworkConfig):
    """U-Net in the manner of ADM and DDPM++ (Dhariwal and Nichol, 2021; Song et al., 2021)."""

    name: str = "unet"
    width: int = 64  # channels that `channel_mults` multiplies
    channel_mults: list[int] = field(default_factory=lambda: [1, 2, 2])  # one for each level
    blocks_per_level: int = 2  # on the way down; one more on the way up
    attention_sizes: list[int] = field(default_factory=lambda: [16])  # map heights that get it
    num_heads: int = 4  # of attention

    not_in_shapes = ("num_heads",)

    def shallowest(self) -> "UNetConfig":
        """The same with one block a level."""
        return replace(self, blocks_per_level=1)

    def __post_init__(self) -> None:
        check_positive("student", width=self.width, num_heads=self.num_heads)
        check_positive("student", blocks_per_level=self.blocks_per_level)
        check(len(self.channel_mults) > 0, "student.channel_mults=[] needs at least one level")
        check(
            self.width % self.num_heads == 0,
            f"student.width={self.width} must be a multiple of student.num_heads={self.num_heads}",
        )


def swiglu_width(width: int, mlp_ratio: float) -> int:
    """Inside the MLP of a LightningDiT."""
    return int(2 / 3 * int(width * mlp_ratio))


@dataclass
class LightningDiTConfig(DiTConfig):
    """LightningDiT (Yao et al., 2025) by its parameter names: a DiT with RMS norms, SwiGLU and
    rotary positions. The MLP is 2/3 of `mlp_ratio` wide, since it has three layers.
    """

    name: str = "lightningdit"
    patch_size: int = 1  # pixels of a patch's side
    qk_norm: bool = False  # whether queries and keys are normalised


@dataclass
class EdmUNetConfig(NetworkConfig):
    """The U-Nets of EDM's public code (Karras et al., 2022) by its parameter names.

    `family=song` is DDPM++ and NCSN++ (Song et al., 2021), `family=adm` that of Dhariwal and
    Nichol (2021). Attention has one head in the first, heads of 64 channels in the second.
    """

    name: str = "edm_unet"
    family: str = "song"  # song (DDPM++, NCSN++) | adm
    width: int = 128  # channels that `channel_mults` multiplies
    channel_mults: list[int] = field(default_factory=lambda: [2, 2, 2])  # one for each level
    blocks_per_level: int = 4  # on the way down; one more on the way up
    attention_sizes: list[int] = field(default_factory=lambda: [16])  # map heights that get it
    embedding: str = "positional"  # of the time: positional | fourier
    noise_mult: int = 1  # features of the time, over `width`
    condition_mult: int = 4  # channels of the condition, over `width`
    encoder: str = "standard"  # standard | skip | residual
    decoder: str = "standard"  # standard | skip
    filter: list[float] = field(default_factory=lambda: [1.0, 1.0])  # of both resamplings
    time: str = "edm"  # what the layers are asked for: edm | flow (`distill.networks.edm_unet`)
    sigma_data: float = 0.5  # standard deviation of the data, of time=edm

    not_in_shapes = ("family", "embedding", "filter", "time", "sigma_data")

    def shallowest(self) -> "EdmUNetConfig":
        """The same with one block a level."""
        return replace(self, blocks_per_level=1)

    def __post_init__(self) -> None:
        check_positive("student", width=self.width, sigma_data=self.sigma_data)
        check_positive("student", blocks_per_level=self.blocks_per_level)
        check(len(self.channel_mults) > 0, "student.channel_mults=[] needs at least one level")
        check(self.width % 4 == 0, f"student.width={self.width} must be a multiple of 4")
        check_choice("student.family", self.family, ("song", "adm"))
        check_choice("student.embedding", self.embedding, ("positional", "fourier"))
        check_choice("student.encoder", self.encoder, ("standard", "skip", "residual"))
        check_choice("student.decoder", self.decoder, ("standard", "skip"))
        check_choice("student.time", self.time, ("edm", "flow"))
        check(
            len(self.filter) in (2, 4),
            f"student.filter={self.filter} must have 2 or 4 weights, such as [1,1] or [1,3,3,1]",
        )


@dataclass
class Edm2UNetConfig(NetworkConfig):
    """EDM2's U-Net (Karras et al., 2024) by its parameter names. Heads have 64 channels."""

    name: str = "edm2_unet"
    width: int = 192  # channels of the first level
    channel_mults: list[int] = field(default_factory=lambda: [1, 2, 3, 4])  # of each level
    blocks_per_level: int = 3  # of the encoder; the decoder has one more
    attention_sizes: list[int] = field(default_factory=lambda: [16, 8])  # map heights that get it
    sigma_data: float = 0.5  # standard deviation of the data

    not_in_shapes = ("sigma_data",)

    def shallowest(self) -> "Edm2UNetConfig":
        """The same with one block a level."""
        return replace(self, blocks_per_level=1)

    def __post_init__(self) -> None:
        check_positive("student", width=self.width, sigma_data=self.sigma_data)
        check_positive("student", blocks_per_level=self.blocks_per_level)
        check(len(self.channel_mults) > 0, "student.channel_mults=[] needs at least one level")


@dataclass
class SameAsTeacherConfig(NetworkConfig):
    """The architecture of the run's last teacher, whatever it is: `student=teacher`.

    The command line puts that one in its place, so no run has it.
    """

    name: str = "teacher"


NETWORKS: dict[str, type[NetworkConfig]] = {
    "dit": DiTConfig,
    "unet": UNetConfig,
    "lightningdit": LightningDiTConfig,
    "edm_unet": EdmUNetConfig,
    "edm2_unet": Edm2UNetConfig,
}


def network_config(settings: dict[str, Any]) -> NetworkConfig:
    """The dataclass of a network from plain settings with its `name`, as in YAML or model.json.

    Raises:
        ConfigError: a value that cannot work; KeyError or TypeError: an unknown name or key.
    """
    kind = NETWORKS[settings["name"]]
    return kind(**{**lacking(kind, settings), **settings})
