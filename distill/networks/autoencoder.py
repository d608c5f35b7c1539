"""Autoencoders of images: pictures to latents, and back. Frozen; who made them says how to scale.

    latent = (z - shift) * scale        z: what the encoder gives; the decoder takes z back

Read are folders of diffusers (`AutoencoderKL` as of Stable Diffusion, and any other of that class,
VA-VAE too; `AutoencoderTiny`), with their scaling_factor, shift_factor, latents_mean and
latents_std; a pipeline's `vae/` too. And the tiny autoencoders of the TAESD family as they are
published, NAME_encoder.pth and NAME_decoder.pth, such as FLUX.2's taef2: their latents need no
scale.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.config import ConfigError, check
from distill.run.files import sha256_file

WIDTH, GROUPS = 64, 4  # of TAESD
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
# A picture's values in [-1, 1] -> mean and standard deviation of z; the latter None: there is none
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Autoencoder:
    """A frozen autoencoder.

    Attributes:
        name: of its class, or of its files.
        fingerprint: sha256 over its weights, hexadecimal.
        to_z: encoder; to_picture: decoder.
        scale, shift: of the latents, [C, 1, 1] or of all channels [1, 1, 1].
        device: where it runs.
    """

    name: str
    fingerprint: str
    to_z: Encode
    to_picture: Callable[[Tensor], Tensor]
    scale: Float[Tensor, "C 1 1"]
    shift: Float[Tensor, "C 1 1"]
    device: torch.device

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"] | None]:
        """Mean and standard deviation of the latents of images in [-1, 1], float32."""
        mean, std = self.to_z(images.to(self.device))
        mean = (mean - self.shift) * self.scale
        return mean.float(), None if std is None else (std * self.scale).float()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in about [-1, 1], float32, where the latents are."""
        z = latents.to(self.device).float() / self.scale + self.shift
        return torch.cat([self.to_picture(part) for part in z.split(16)]).float().to(latents.device)


def load_autoencoder(path: str, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder in a folder.

    Raises:
        ConfigError: there is none that is read here, or its files are not whole.
    """
    folder, place = Path(path), torch.device(device)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if (folder / "config.json").is_file():
        return _of_diffusers(folder, place)
    pairs = [
        (one, one.with_name(one.name.replace("_encoder", "_decoder")))
        for one in sorted(folder.glob("*_encoder.pth"))
    ]
    pairs = [pair for pair in pairs if pair[1].is_file()]
    check(
        len(pairs) == 1,
        f"{path} must hold one autoencoder: config.json of {' or '.join(CLASSES)}, or "
        f"NAME_encoder.pth and NAME_decoder.pth; it holds {len(pairs)} such pairs",
    )
    return _of_taesd(*pairs[0], place)


def _fingerprint(files: list[Path]) -> str:
    return sha256("".join(sha256_file(one) for one in files).encode()).hexdigest()


def _of_diffusers(folder: Path, device: torch.device) -> Autoencoder:
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name")
    check(kind in CLASSES, f"{folder} holds a {kind}; read are {' and '.join(CLASSES)}")
    check(
        importlib.util.find_spec("diffusers") is not None,
        f"{folder} is of diffusers: pip install 'bowstring[diffusers]'",
    )
    import diffusers  # long to import

    try:
        found: Any = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be read as a {kind} ({error})") from error
    found = found.to(device).eval().requires_grad_(False)

    def to_z(images: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = found.encode(images)
        if kind == "AutoencoderTiny":
            return encoded.latents, None
        return encoded.latent_dist.mean, encoded.latent_dist.std

    def of_channel(values: Any, value: float) -> Tensor:
        return torch.tensor(values or [value], device=device, dtype=torch.float32)[:, None, None]

    factor = config.get("scaling_factor") or 1.0
    mean = of_channel(config.get("latents_mean"), config.get("shift_factor") or 0.0)
    std = of_channel(config.get("latents_std"), 1.0)
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return Autoencoder(
        kind, _fingerprint(weights), to_z, lambda z: found.decode(z).sample, factor / std, mean,
        device,
    )  # fmt: skip


# -----------------------------------------------------------------------------------------------
# TAESD


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    """relu(conv(x) + x), conv of three 3x3; in the middle after x + pool(x), with normed groups."""

    def __init__(self, has_pool: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )
        wide = GROUPS * WIDTH
        self.pool = nn.Sequential()
        if has_pool:
            self.pool.append(nn.Conv2d(WIDTH, wide, 1, bias=False))
            self.pool.append(nn.GroupNorm(GROUPS, wide))
            self.pool.append(nn.ReLU())
            self.pool.append(nn.Conv2d(wide, WIDTH, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.pool):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _conv(inside: int, outside: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, **settings)


def _taesd_encoder(channels: int, has_pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3, WIDTH), _Block(False)]
    for level in range(3):
        layers.append(_conv(WIDTH, WIDTH, stride=2, bias=False))
        layers += [_Block(has_pool and level == 2) for _ in range(3)]
    return nn.Sequential(*layers, _conv(WIDTH, channels))


def _taesd_decoder(channels: int, has_pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [_Clamp(), _conv(channels, WIDTH), nn.ReLU()]
    for level in range(3):
        layers += [_Block(has_pool and level == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, _Block(False), _conv(WIDTH, 3))


def _of_taesd(encoder: Path, decoder: Path, device: torch.device) -> Autoencoder:
    networks = []
    for path, make, last in ((encoder, _taesd_encoder, -1), (decoder, _taesd_decoder, 0)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            ends = [value for name, value in state.items() if value.ndim == 4 and "." in name]
            channels = ends[last].shape[0 if last else 1]
            network = make(channels, any(".pool." in name for name in state))
            network.load_state_dict(state)
        except (OSError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(f"{path} is no autoencoder of the TAESD family ({error})") from error
        networks.append(network.float().to(device).eval().requires_grad_(False))
    down, up = networks
    one = torch.ones(1, 1, 1, device=device)
    return Autoencoder(
        encoder.name.removesuffix("_encoder.pth"), _fingerprint([encoder, decoder]),
        lambda images: (down((images + 1) / 2), None), lambda z: up(z) * 2 - 1,
        one, one * 0, device,
    )  # fmt: skip
