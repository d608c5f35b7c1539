"""Teachers trained as EDM denoisers (Karras et al., 2022), as velocities.

EDM denoises y = x_1 + sigma x_0 by D(y, sigma) = c_skip y + c_out F(c_in y, c_noise). Our x_t =
(1-t) x_0 + t x_1 is t y for sigma = (1-t)/t, and E[x_1 - x_0 | x_t] = (D - x_t) / (1 - t). With d =
sigma_data and n^2 = (1-t)^2 + t^2 d^2, EDM's c_skip, c_out, c_in give

    v(x_t, t) = (t d^2 - (1-t)) / n^2 x_t + d/n F(x_t / n, ln(sigma) / 4),

which is finite at both ends: only c_noise = ln(sigma) / 4 is not, and sigma is kept there within
the range the network was trained on.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ConfigError, ImageSpec
from distill.networks.edm_unet import of_denoiser
from distill.networks.files import DESCRIPTION, WEIGHTS, fingerprint, load_model, open_model
from distill.teachers.base import TeacherDescription
from distill.teachers.config import EdmConfig
from distill.teachers.precision import prepared


class EdmTeacher:
    """The velocity of an EDM-preconditioned network F(x, c_noise [B], label)."""

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Tensor], Tensor],
        image: ImageSpec,
        fingerprint: str,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        self.network, self.image, self.fingerprint = network, image, fingerprint
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, label)."""

        def raw(x_in: Tensor, c_noise: Tensor) -> Tensor:
            return self.network(x_in, c_noise, label)

        return of_denoiser(raw, x, t, self.sigma_data, (self.sigma_min, self.sigma_max))


def is_folder(config: EdmConfig) -> bool:
    """Whether `config` names a model folder, not a file of EDM's own weights."""
    return (Path(config.path) / DESCRIPTION).is_file()


def describe_edm(config: EdmConfig) -> TeacherDescription:
    """What a model folder with our network, trained as EDM trains, holds.

    `meta` of its model.json must hold "edm": {"sigma_data", "sigma_min", "sigma_max"}.

    Raises:
        ConfigError: no whole model, or no such entry.
    """
    folder = Path(config.path)
    network, meta = open_model(folder)
    settings = meta.get("edm")
    names = {"sigma_data", "sigma_min", "sigma_max"}
    if not isinstance(settings, dict) or settings.keys() != names:
        raise ConfigError(f"{folder}: meta.edm in model.json must hold {', '.join(sorted(names))}")
    return TeacherDescription(network.image, fingerprint(folder / WEIGHTS))


def load_edm(config: EdmConfig, device: torch.device | str) -> EdmTeacher:
    """The teacher of a model folder, run as F(x, c_noise, label) = u(x, c_noise, c_noise, label).

    Raises as `describe_edm`.
    """
    description = describe_edm(config)
    network, meta = load_model(Path(config.path), device)
    call = prepared(network, config)

    def raw(x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        return call(x, c_noise, c_noise, label)

    return EdmTeacher(raw, description.image, description.fingerprint, **meta["edm"])
