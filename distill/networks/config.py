"""Settings of the networks, one dataclass each. No torch."""

from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from distill.config import check, check_positive, lacking


@dataclass
class NetworkConfig:
    """Base of the network variants; one subclass per architecture."""

    name: str = MISSING  # dit | unet

    def shallowest(self) -> "NetworkConfig":
        """The same with the fewest blocks. What the constructor makes before them stays the same.

        `distill.networks.files.load_weights` takes from it what a file of weights leaves out.
        """
        return self


@dataclass
class DiTConfig(NetworkConfig):
    """Diffusion transformer with SiT's parameter names (Ma et al., 2024)."""

    name: str = "dit"
    patch_size: int = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0

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
    width: int = 64
    channel_mults: list[int] = field(default_factory=lambda: [1, 2, 2])
    blocks_per_level: int = 2
    attention_sizes: list[int] = field(default_factory=lambda: [16])  # map heights that get it
    num_heads: int = 4

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


NETWORKS: dict[str, type[NetworkConfig]] = {"dit": DiTConfig, "unet": UNetConfig}


def network_config(settings: dict[str, Any]) -> NetworkConfig:
    """The dataclass of a network from plain settings with its `name`, as in YAML or model.json.

    Raises:
        ConfigError: a value that cannot work; KeyError or TypeError: an unknown name or key.
    """
    kind = NETWORKS[settings["name"]]
    return kind(**{**lacking(kind, settings), **settings})
