"""What a teacher is, and classifier-free guidance."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ImageSpec, check


@runtime_checkable
class FrozenTeacher(Protocol):
    """A velocity field that is never trained, in our convention: t = 0 noise, t = 1 data."""

    @property
    def image(self) -> ImageSpec:
        """Shape and classes it was trained on."""

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the bytes of its weights."""

    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, label) without gradient; label -1 is "none"."""


class Guided:
    """A teacher's velocity under classifier-free guidance (Ho and Salimans, 2022).

        v = v(x, t, none) + scale (v(x, t, label) - v(x, t, none))

    Both halves go through the network as one batch of twice the size. At scale 1 only the second
    one is needed and only it is computed.

    Attributes:
        evaluations: calls so far. NFE counts these: evaluations of the guided field.
        forwards: batches of the caller's size that went through the network: the cost.
    """

    def __init__(self, teacher: FrozenTeacher, scale: float) -> None:
        check(
            scale == 1 or teacher.image.num_classes > 0,
            f"teacher.guidance={scale} needs a teacher with classes; set teacher.guidance=1",
        )
        self.teacher, self.scale = teacher, scale
        self.evaluations = self.forwards = 0

    def __call__(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """The guided velocity; label -1 gives v(x, t, none)."""
        self.evaluations += 1
        if self.scale == 1:
            self.forwards += 1
            return self.teacher.velocity(x, t, label)
        self.forwards += 2
        labels = torch.cat([torch.full_like(label, -1), label])
        both = self.teacher.velocity(torch.cat([x, x]), torch.cat([t, t]), labels)
        none, labelled = both.chunk(2)
        return torch.lerp(none, labelled, self.scale)


def guided(teacher: FrozenTeacher, scale: float) -> Guided:
    """The velocity (x, t [B], label) of `teacher` under guidance of `scale`; 1 is no guidance.

    Raises:
        ConfigError: guidance of a teacher that has no classes.
    """
    return Guided(teacher, scale)
