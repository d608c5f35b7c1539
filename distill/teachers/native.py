"""A teacher of our own: a model folder. Its velocity is the diagonal u(x, t, t) of the network."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.models import fingerprint, load_model


class NativeTeacher:
    """The network of a model folder.

    Raises:
        ConfigError: the folder holds no whole model.
    """

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self.network, _ = load_model(folder, device)
        self.image = self.network.image
        self.fingerprint = fingerprint(folder)

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, t, label)."""
        return self.network(x, t, t, label)
