"""What a model was trained to predict, along which path, and the velocity that follows from it.

We have x_t = (1 - t) x_0 + t x_1 with noise x_0 and data x_1. Another path y = alpha x_1 + sigma
x_0 has the same ratio of data to noise at the time tau where alpha / sigma = t / (1 - t), so there

    y = (alpha + sigma) x_t,

and what the model says of y it says of x_t. With E_1 = E[x_1 | y] and E_0 = E[x_0 | y] it predicts

    velocity   d alpha/d tau E_1 + d sigma/d tau E_0       noise   E_0       data    E_1
    v          alpha E_0 - sigma E_1                       score   -E_0 / sigma

which, with y = alpha E_1 + sigma E_0, gives both, and the velocity of ours: E_1 - E_0. It is
computed as (E_1 - x_t) / (1 - t) for t below 1/2 and (x_t - E_0) / t above, which is the same and
does not magnify what a model leaves of the noise.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.flow.paths import expand_as
from distill.teachers.config import PATH_TYPES, PREDICTIONS, TIMES, ConventionConfig

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # (y, tau [B], label [B]) -> a prediction of y
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t [B], label [B]) -> v

END = 1e-3  # nearest to either end of time that a prediction other than a velocity is asked for
# Nearest to noise that noise is asked for, and to data that data is: the other one follows by a
# division by 0.02. What is learned of the data from so near to noise is next to nothing.
FAR_END = 0.02
VP_RATES = (0.1, 20.0)  # beta at data and at noise of SiT's and score_sde's VP path


@dataclass(frozen=True)
class Convention:
    """A convention; the defaults are ours.

    Attributes:
        path_type: linear; gvp: sin and cos of tau pi/2; vp: of a linear beta, tau from 0 to 1;
            ddpm: of `betas`, at steps that count from data to noise.
        prediction: velocity, noise, data, score or v.
        time: noise_to_data, or data_to_noise: the model's time is 1 - tau, and a velocity has the
            other sign. Steps of ddpm run so anyway.
        betas: noise added by each step of ddpm.
        unit: what the model is asked for in place of a time of 1, but for steps.
    """

    path_type: str = "linear"
    prediction: str = "velocity"
    time: str = "noise_to_data"
    betas: tuple[float, ...] = ()
    unit: float = 1.0

    @property
    def is_ours(self) -> bool:
        """Whether the prediction is the velocity that we want, but for time and sign."""
        return self.path_type == "linear" and self.prediction == "velocity"

    @property
    def is_foreign(self) -> bool:
        """Whether anything has to be converted."""
        return not self.is_ours or self.time != "noise_to_data" or self.unit != 1

    @property
    def words(self) -> str:
        """As settings."""
        return (
            f"teacher.path_type={self.path_type} teacher.prediction={self.prediction} "
            f"teacher.time={self.time}"
        )


def every(unit: float = 1.0) -> Iterator[Convention]:
    """Every convention there is, with the betas of DDPM."""
    for path_type, prediction in product(PATH_TYPES, PREDICTIONS):
        if path_type != "ddpm":
            for time in TIMES:
                yield Convention(path_type, prediction, time, unit=unit)
        elif prediction != "velocity":
            yield Convention(path_type, prediction, "data_to_noise", linear_betas())


def linear_betas(first: float = 1e-4, last: float = 0.02, steps: int = 1000) -> tuple[float, ...]:
    """The betas of DDPM (Ho et al., 2020), which DiT and ADM were trained with."""
    return tuple(torch.linspace(first, last, steps, dtype=torch.float64).tolist())


def convention_of(config: ConventionConfig, found: Convention) -> Convention:
    """`found`, what files say, under the settings that were given."""
    return Convention(
        config.path_type or found.path_type,
        config.prediction or found.prediction,
        config.time or found.time,
        found.betas or linear_betas(),
        found.unit,
    )


class Converted:
    """The velocity (x, t, label) of a model that was trained in another convention."""

    def __init__(self, model: Model, convention: Convention) -> None:
        self.model, self.convention = model, convention
        self._path = _Path(convention)

    def __call__(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, label), in our convention."""
        is_reversed = self.convention.time == "data_to_noise"
        sign = -1.0 if is_reversed and self.convention.prediction == "velocity" else 1.0
        if self.convention.is_ours:
            tau = 1 - t if is_reversed else t
            return sign * self.model(x, self.convention.unit * tau, label)
        held = t.clamp(*self._path.range)
        tau, alpha, sigma, d_alpha, d_sigma = self._path.at(held)
        if self.convention.path_type != "ddpm":
            tau = self.convention.unit * (1 - tau if is_reversed else tau)
        alpha, sigma = expand_as(alpha, x), expand_as(sigma, x)
        y = (alpha + sigma) * x
        predicted = sign * self.model(y.to(x.dtype), tau.to(t.dtype), label)
        match self.convention.prediction:
            case "noise":
                noise, data = predicted, (y - sigma * predicted) / alpha
            case "data":
                noise, data = (y - alpha * predicted) / sigma, predicted
            case "score":
                noise = -sigma * predicted
                data = (y - sigma * noise) / alpha
            case "v":
                n_2 = alpha**2 + sigma**2
                noise = (alpha * predicted + sigma * y) / n_2
                data = (alpha * y - sigma * predicted) / n_2
            case _:
                d_alpha, d_sigma = expand_as(d_alpha, x), expand_as(d_sigma, x)
                det = alpha * d_sigma - sigma * d_alpha
                data = (d_sigma * y - sigma * predicted) / det
                noise = (alpha * predicted - d_alpha * y) / det
        t_ = expand_as(t, x)
        below = (data - x) / (1 - t_).clamp_min(0.5)
        above = (x - noise) / t_.clamp_min(0.5)
        return torch.where(t_ < 0.5, below, above).to(x.dtype)


class _Path:
    """alpha and sigma of a path, at our times."""

    def __init__(self, convention: Convention) -> None:
        self.kind = convention.path_type
        low = FAR_END if convention.prediction in ("noise", "score") else END
        high = 1 - (FAR_END if convention.prediction == "data" else END)
        self.range = (0.0, 1.0) if convention.prediction == "velocity" else (low, high)
        if self.kind == "ddpm":
            kept = torch.cumprod(1 - torch.tensor(convention.betas, dtype=torch.float64), 0)
            self._ratios = 0.5 * (kept.log() - (1 - kept).log())  # ln(alpha / sigma), falling
            first, last = self._ratios[[0, -1]].sigmoid().tolist()
            self.range = (max(last, low), min(first, high))
        elif self.kind == "vp":
            slowest, fastest = VP_RATES
            end = 1 / (1 + math.sqrt(math.expm1((slowest + fastest) / 2)))
            self.range = (max(end, low), high)

    def at(self, t: Float[Tensor, "B"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """tau, alpha, sigma, d alpha/d tau and d sigma/d tau, each [B], where the ratio is ours."""
        t = t.double()
        if self.kind == "linear":
            one = torch.ones_like(t)
            return t, t, 1 - t, one, -one
        n = (t**2 + (1 - t) ** 2).sqrt()
        alpha, sigma = t / n, (1 - t) / n
        if self.kind == "gvp":
            half_pi = math.pi / 2
            return torch.atan2(t, 1 - t) / half_pi, alpha, sigma, half_pi * sigma, -half_pi * alpha
        if self.kind == "ddpm":
            return self._step(t), alpha, sigma, t, t
        # vp: ln alpha = -(b_1 - b_0) u^2 / 4 - b_0 u / 2 with u = 1 - tau.
        low, high = VP_RATES
        u = (torch.sqrt(low**2 - 4 * (high - low) * alpha.log()) - low) / (high - low)
        rate = ((high - low) * u + low) / 2
        return 1 - u, alpha, sigma, rate * alpha, -rate * alpha**2 / sigma

    def _step(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The step of ddpm, between two of the table by the logarithm of the ratio."""
        ratios = self._ratios.to(t.device).flip(0)
        wanted = torch.logit(t).clamp(ratios[0], ratios[-1])
        above = torch.searchsorted(ratios, wanted).clamp(1, len(ratios) - 1)
        low, high = ratios[above - 1], ratios[above]
        return (len(ratios) - 1) - (above - 1 + (wanted - low) / (high - low))
