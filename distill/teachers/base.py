"""What a teacher is, and is known to be beforehand; its field under guidance; a student's jumps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from distill.conditions.condition import NO_CLASS, Condition, joined
from distill.config import ImageSpec, check
from distill.flow.paths import MeanVelocity
from distill.flow.times import EVEN
from distill.networks.config import NetworkConfig
from distill.teachers.config import TeacherConfig


@dataclass(frozen=True)
class TeacherDescription:
    """What a run must know of a teacher before its weights are needed.

    Attributes:
        image: shape and classes it was trained on.
        fingerprint: sha256, in hex, of the bytes of its weights.
        is_student: whether it is one, with guidance in it already.
        has_none: whether it knows the label "none", without which there is no guidance.
        network: the architecture of a student that can start from its weights; None: there is none.
        notes: what the user should hear: how a file was read where it left a choice.
    """

    image: ImageSpec
    fingerprint: str
    is_student: bool = False
    has_none: bool = True
    network: NetworkConfig | None = None
    notes: tuple[str, ...] = ()


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
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], condition: Any
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, condition) without gradient, for a condition of the kind that it takes."""


def check_guidance(image: ImageSpec, scale: float) -> None:
    """Raises ConfigError for guidance of a teacher of `image` that has no classes."""
    check(
        scale == 1 or image.num_classes > 0,
        f"teacher.guidance={scale} needs a teacher with classes; set teacher.guidance=1",
    )


def check_none(config: TeacherConfig, has_none: bool) -> None:
    """Raises ConfigError for guidance of a teacher that was never shown the label "none"."""
    check(
        has_none or config.guidance == 1,
        f'teacher.guidance={config.guidance} needs a teacher that knows the label "none", and '
        f"{config.path} was trained without it; set teacher.guidance=1",
    )


class Guided:
    """A teacher's velocity under classifier-free guidance (Ho and Salimans, 2022).

        v = v(x, t, none) + scale (v(x, t, condition) - v(x, t, none))

    Both halves go through the network as one batch of twice the size. At scale 1 only the second
    one is needed and only it is computed. Above 0, `channels` is how many channels, first ones, are
    guided; the others keep v(x, t, condition), as in the samplers of DiT and SiT.

    Attributes:
        evaluations: calls so far. NFE counts these: evaluations of the guided field.
        forwards: batches of the caller's size that went through the network: the cost.
    """

    def __init__(
        self, teacher: FrozenTeacher, scale: float, channels: int = 0, none: Condition = NO_CLASS
    ) -> None:
        """`none` is one condition, "none" of its kind."""
        check_guidance(teacher.image, scale)
        check(
            channels <= teacher.image.channels,
            f"teacher.guided_channels={channels}, but the teacher has {teacher.image.channels}",
        )
        self.teacher, self.scale, self.channels, self.none = teacher, scale, channels, none
        self.evaluations = self.forwards = 0

    def __call__(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], condition: Any
    ) -> Float[Tensor, "B C H W"]:
        """The guided velocity; that of "none" is v(x, t, none)."""
        self.evaluations += 1
        if self.scale == 1:
            self.forwards += 1
            return self.teacher.velocity(x, t, condition)
        self.forwards += 2
        conditions = joined([self.none.to(x.device).repeat(len(x)), condition])
        both = self.teacher.velocity(torch.cat([x, x]), torch.cat([t, t]), conditions)
        none, labelled = both.chunk(2)
        field = torch.lerp(none, labelled, self.scale)
        if self.channels:
            field[:, self.channels :] = labelled[:, self.channels :]
        return field


def guided(
    teacher: FrozenTeacher, scale: float, channels: int = 0, none: Condition = NO_CLASS
) -> Guided:
    """The velocity (x, t [B], condition) of `teacher` under guidance of `scale`; 1 is no guidance.

    Raises:
        ConfigError: guidance of a teacher that has no classes, or of channels that it has not.
    """
    return Guided(teacher, scale, channels, none)


class NetworkTeacher:
    """A teacher that is a network of ours: its velocity is the diagonal u(x, t, t)."""

    def __init__(
        self, network: MeanVelocity, description: TeacherDescription, middle: float = EVEN
    ) -> None:
        """`middle` is where the second of two jumps begins, of a student."""
        self.network, self.middle = network, middle
        self.image, self.fingerprint = description.image, description.fingerprint
        self.is_student = description.is_student

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], condition: Any
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, t, condition)."""
        return self.network(x, t, t, condition)


class VelocityTeacher:
    """A teacher whose velocity is a function (x, t, condition) of its own."""

    def __init__(
        self, function: Callable[[Tensor, Tensor, Tensor], Tensor], description: TeacherDescription
    ) -> None:
        self.function = function
        self.image, self.fingerprint = description.image, description.fingerprint

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], condition: Any
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, condition)."""
        return self.function(x, t, condition)


class Jumps(Guided):
    """The mean velocity u(x, t, s, condition) of a student as teacher, counted as in `Guided`."""

    def __init__(self, teacher: NetworkTeacher) -> None:
        super().__init__(teacher, 1.0)
        self._network, self.middle = teacher.network, teacher.middle

    @torch.no_grad()
    def mean_velocity(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        condition: Condition,
    ) -> Float[Tensor, "B C H W"]:
        """u(x, t, s, condition): one evaluation, one forward."""
        self.evaluations += 1
        self.forwards += 1
        return self._network(x, t, s, condition)
