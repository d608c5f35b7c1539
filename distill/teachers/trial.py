"""A teacher is tried before the budget is spent: do its own samples bear out what it predicts?

A velocity field of rectified flow is a conditional expectation, v(x_t, t) = E[x_1 - x_0 | x_t]. So
of samples x_1 of its own and fresh noise x_0, with d = x_1 - x_0 at x_t = (1 - t) x_0 + t x_1, v is
the best guess of d: what it leaves, d - v, is orthogonal to all that follows from x_t. So
<d, v> / <v, v> is 1 at every t, d - v has no mean and no part along x_t, and the error

    e = |d - v|^2 / |d|^2

is far below that of 0, which is 1, of -v, and of v(x_t, 1 - t). A field in another convention
fails: what it makes of noise is not what it expects there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.config import ConfigError, ImageSpec
from distill.flow.noise import sample_labels, sample_noise
from distill.flow.solvers import solve
from distill.teachers.base import FrozenTeacher
from distill.teachers.build import readings
from distill.teachers.config import ConventionConfig, TeacherConfig

TIMES = (0.1, 0.3, 0.7, 0.9)
STEPS = 16  # of Heun, for the samples
SEARCH = (8, 8)  # samples and steps of each convention, when another is looked for
FINALISTS = 4  # the best of these, tried as the teacher was
FITS = 1.3  # largest misfit of one that is named
MOST_ERROR = 0.7  # of the error of 0
MOST_OF_OTHERS = 0.9  # of that of the reversed time and of the other sign
SLOPES = (0.55, 1.5)  # <d, v> / <v, v>, between these at every t
MOST_LEFT = 0.2  # of |d|, of the mean of d - v and of its part along x_t, at every t
MOST_SIZE = 4.0  # root mean square of the samples; what explodes is easy to predict

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """What a trial found, all as parts of the error of predicting 0, means over TIMES.

    Attributes:
        error: of the teacher.
        reversed_time: of the teacher asked at 1 - t.
        other_sign: of minus the teacher.
        slope_low, slope_high: of <d, v> / <v, v> over TIMES.
        left: largest of the mean of d - v and of its part along x_t, as parts of |d|.
        size: root mean square of its samples.
        samples: how many of them were noised.
    """

    error: float
    reversed_time: float
    other_sign: float
    slope_low: float
    slope_high: float
    left: float
    size: float
    samples: int

    @property
    def misfit(self) -> float:
        """The worst figure, each as a part of what it may be: below 1 where all is well."""
        others = min(self.reversed_time, self.other_sign)
        low, high = (math.log(max(slope, 1e-9)) for slope in (self.slope_low, self.slope_high))
        return max(
            self.error / MOST_ERROR,
            self.error / (MOST_OF_OTHERS * others),
            low / math.log(SLOPES[0]),
            high / math.log(SLOPES[1]),
            self.left / MOST_LEFT,
            self.size / MOST_SIZE,
        )

    @property
    def is_passed(self) -> bool:
        """Whether the samples bear the teacher out."""
        return self.misfit < 1

    @property
    def words(self) -> str:
        """In a sentence."""
        return (
            f"its own samples, noised again, are predicted with {self.error:.3f} of the error of "
            f"predicting 0 (at the reversed time {self.reversed_time:.3f}, with the other sign "
            f"{self.other_sign:.3f}); slopes {self.slope_low:.2f} to {self.slope_high:.2f}, where "
            f"1 is right; up to {self.left:.2f} of it could be told from x_t and is not; root mean "
            f"square {self.size:.3g}"
        )


@torch.inference_mode()
def try_velocity(
    velocity: Velocity,
    image: ImageSpec,
    device: torch.device | str,
    seed: int,
    samples: int,
    steps: int = STEPS,
) -> Trial:
    """The trial of a velocity field (x, t [B], label [B]) without guidance."""
    ids = np.arange(samples, dtype=np.int64)
    noise = torch.from_numpy(sample_noise(seed, ids, image.shape)).to(device)
    fresh = torch.from_numpy(sample_noise(seed, ids + samples, image.shape)).to(device)
    label = torch.from_numpy(sample_labels(seed, ids, image.num_classes)).to(device)

    def at(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype), label)

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    path = solve(lambda x, t: velocity(x, t.expand(len(x)), label), noise, ends, "heun", steps)
    data = path[-1].to(noise.dtype)
    d = (data - fresh).double()
    size, found = float(d.square().sum()), []
    for t in TIMES:
        x_t = torch.lerp(fresh, data, t)
        v, v_reversed = at(x_t, t).double(), at(x_t, 1 - t).double()
        errors = [float((d - guess).square().sum()) / size for guess in (v, v_reversed, -v)]
        rest, along = d - v, x_t.double()
        part = float((rest * along).sum().abs() / along.norm()) / size**0.5
        mean = float(rest.mean().abs()) * rest.numel() ** 0.5 / size**0.5
        found.append([*errors, float((d * v).sum() / v.square().sum()), max(part, mean)])
    table = torch.tensor(found, dtype=torch.float64).nan_to_num(torch.inf)
    error, reversed_time, other_sign, *_ = (round(float(mean), 4) for mean in table.mean(0))
    left = round(float(table[:, 4].max()), 3)
    slopes = table[:, 3]
    low, high = round(float(slopes.min()), 3), round(float(slopes.max()), 3)
    rms = round(float(data.double().square().mean().sqrt().nan_to_num(torch.inf)), 4)
    return Trial(error, reversed_time, other_sign, low, high, left, rms, samples)


def try_teacher(
    name: str,
    teacher: FrozenTeacher,
    config: TeacherConfig,
    device: torch.device | str,
    seed: int,
    samples: int = 32,
) -> Trial:
    """The trial of a teacher. One that jumps, as a student does, is tried by its diagonal.

    Raises:
        ConfigError: it is not passed, with the conversion that would be; not where
            `teacher.trial` is false, or where the convention is our own, of which only training
            can be short.
    """
    trial = try_velocity(teacher.velocity, teacher.image, device, seed, samples)
    if trial.is_passed or not config.trial or not isinstance(config, ConventionConfig):
        return trial

    def tried(velocity: Velocity, *few: int) -> float:
        return try_velocity(velocity, teacher.image, device, seed, *(few or (samples,))).misfit

    found = [(tried(v, *SEARCH), words, v) for words, v in readings(config, device)]
    found = sorted(found, key=lambda one: one[0])[:FINALISTS]
    misfit, words = min([(tried(v), words) for _, words, v in found], default=(math.inf, ""))
    fits = misfit < min(FITS, trial.misfit)
    way = f"what fits is {words}" if fits else "no other convention that is known fits"
    raise ConfigError(
        f"teacher.{name} is no velocity field from noise to data: {trial.words}; {way}. Set that, "
        f"or, to take it as it is, teacher.{name}.trial=false"
    )
