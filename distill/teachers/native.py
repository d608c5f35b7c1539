"""A teacher of our own: a model folder. Its velocity is the diagonal u(x, t, t) of the network.

A student is a teacher too. After `reflow` its field is the next rectified flow, for any solver.
After the other objectives it is a map G, to be used in jumps that it was trained on.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.networks.files import WEIGHTS, fingerprint, load_model
from distill.teachers.base import Guided


class NativeTeacher:
    """The network of a model folder.

    Raises:
        ConfigError: the folder holds no whole model.
    """

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self.network, meta = load_model(folder, device)
        self.is_student = meta.get("kind") == "student"
        self.image = self.network.image
        self.fingerprint = fingerprint(folder / WEIGHTS)

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, t, label)."""
        return self.network(x, t, t, label)


class Jumps(Guided):
    """The mean velocity u(x, t, s, label) of a native teacher, counted as `Guided` counts."""

    def __init__(self, teacher: NativeTeacher) -> None:
        super().__init__(teacher, 1.0)
        self._network = teacher.network

    @torch.no_grad()
    def mean_velocity(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, s, label): one evaluation, one forward."""
        self.evaluations += 1
        self.forwards += 1
        return self._network(x, t, s, label)
