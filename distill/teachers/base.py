"""What a teacher is, and is known to be beforehand; its field under guidance; a student's jumps."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ImageSpec, check
from distill.flow.times import EVEN
from distill.networks.layers import AbstractNetwork


@dataclass(frozen=True)
class TeacherDescription:
    """What a run must know of a teacher before its weights are needed.

    Attributes:
        image: shape and classes it was trained on.
        fingerprint: sha256, in hex, of the bytes of its weights.
        is_student: whether it is one, with guidance in it already.
    """

    image: ImageSpec
    fingerprint: str
    is_student: bool = False


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


def check_guidance(image: ImageSpec, scale: float) -> None:
    """Raises ConfigError for guidance of a teacher of `image` that has no classes."""
    check(
        scale == 1 or image.num_classes > 0,
        f"teacher.guidance={scale} needs a teacher with classes; set teacher.guidance=1",
    )


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
        check_guidance(teacher.image, scale)
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


class NetworkTeacher:
    """A teacher that is a network of ours: its velocity is the diagonal u(x, t, t)."""

    def __init__(
        self, network: AbstractNetwork, description: TeacherDescription, middle: float = EVEN
    ) -> None:
        """`middle` is where the second of two jumps begins, of a student."""
        self.network, self.middle = network, middle
        self.image, self.fingerprint = description.image, description.fingerprint
        self.is_student = description.is_student

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, t, label)."""
        return self.network(x, t, t, label)


class Jumps(Guided):
    """The mean velocity u(x, t, s, label) of a student as teacher, counted as `Guided` counts."""

    def __init__(self, teacher: NetworkTeacher) -> None:
        super().__init__(teacher, 1.0)
        self._network, self.middle = teacher.network, teacher.middle

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
