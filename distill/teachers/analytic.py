"""Closed-form teachers: mixtures of isotropic Gaussians. All error is the student's.

With data x_1 ~ sum_k pi_k N(m_k, c_k^2 I) and x_t = (1-t) x_0 + t x_1, component k has at time t
mean t m_k and variance v_k = (1-t)^2 + t^2 c_k^2 per axis, and

    v(x, t) = sum_k r_k [m_k + (t c_k^2 - (1-t)) / v_k (x - t m_k)],   r_k ~ pi_k N(x; t m_k, v_k
    I).
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ConfigError, ImageSpec
from distill.flow.paths import expand_as
from distill.teachers.base import TeacherDescription
from distill.teachers.config import AnalyticConfig


class MixtureTeacher:
    """The exact velocity of a Gaussian mixture on images, or on vectors as images [D, 1, 1].

    With `conditional`, class k is component k alone, and "none" the whole mixture.
    """

    def __init__(
        self,
        means: Float[Tensor, "K C H W"],
        stds: Float[Tensor, "K"],
        weights: Float[Tensor, "K"],
        conditional: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """`stds` are the c_k, above 0; `weights` are the pi_k up to a factor."""
        if means.shape[-1] != means.shape[-2]:
            raise ConfigError(f"a mixture needs square images, not {list(means.shape[1:])}")
        if not (len(means) == len(stds) == len(weights)) or stds.min() <= 0 or weights.min() <= 0:
            raise ConfigError("a mixture needs a std and a weight above 0 for every mean")
        means, stds = means.double().cpu(), stds.double().cpu()
        weights = weights.double().cpu() / weights.double().sum().cpu()
        num_classes = len(means) if conditional else 0
        self.image = ImageSpec(means.shape[1], means.shape[2], num_classes)
        numbers = [tensor.numpy().astype("<f8").tobytes() for tensor in (means, stds, weights)]
        text = json.dumps([list(means.shape), conditional]).encode()
        self.fingerprint = hashlib.sha256(b"".join([text, *numbers])).hexdigest()
        self.means, self.stds, self.weights = (v.to(device) for v in (means, stds, weights))

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, label), computed in the dtype of x."""
        means = self.means.to(x.dtype).flatten(1)
        c_2 = self.stds.to(x.dtype) ** 2
        t_ = t.to(x.dtype)[:, None]
        variance = (1 - t_) ** 2 + t_**2 * c_2
        offset = x.flatten(1)[:, None] - t_[..., None] * means
        slope = (t_ * c_2 - (1 - t_)) / variance
        of_component = means + slope[..., None] * offset
        log_r = self.weights.to(x.dtype).log() - offset.square().sum(-1) / (2 * variance)
        log_r = log_r - means.shape[1] / 2 * variance.log()
        if self.image.num_classes:
            other = torch.arange(len(means), device=label.device) != label[:, None]
            log_r = log_r.masked_fill((label[:, None] >= 0) & other, -torch.inf)
        return torch.einsum("bk,bkd->bd", log_r.softmax(dim=1), of_component).view_as(x)

    def sample(self, noise: Float[Tensor, "B C H W"], u: Float[Tensor, "B"]) -> Tensor:
        """Data [B, C, H, W] from normal `noise` and `u` in [0, 1), which picks components."""
        bounds = self.weights.cumsum(0)[:-1].to(u.dtype)
        component = torch.bucketize(u, bounds, right=True)
        stds = self.stds[component].to(noise.dtype)
        return self.means[component].to(noise.dtype) + expand_as(stds, noise) * noise


def ring(count: int = 8, radius: float = 2.0, std: float = 0.15) -> MixtureTeacher:
    """`count` equal Gaussians on a circle in 2-D, as images [2, 1, 1]."""
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    ones = torch.ones(count, dtype=torch.float64)
    return MixtureTeacher(means[:, :, None, None], std * ones, ones)


def random_mixture(dimensions: int = 64, count: int = 10, std: float = 0.3) -> MixtureTeacher:
    """A fixed mixture of unequal weights with means drawn from N(0, I), as images [D, 1, 1]."""
    draw = np.random.Generator(np.random.Philox(key=[dimensions, count]))
    means = torch.from_numpy(draw.standard_normal((count, dimensions)))[:, :, None, None]
    ones = torch.ones(count, dtype=torch.float64)
    return MixtureTeacher(means, std * ones, torch.arange(1, count + 1).double())


PRESETS = {"ring8": ring, "mixture64": random_mixture}


def describe_analytic(config: AnalyticConfig) -> TeacherDescription:
    """What a mixture holds: it is its few numbers. Raises as `load_analytic`."""
    teacher = load_analytic(config, "cpu")
    return TeacherDescription(teacher.image, teacher.fingerprint)


def load_analytic(config: AnalyticConfig, device: torch.device | str) -> MixtureTeacher:
    """The mixture of a name in PRESETS, or of a JSON file.

    The file holds {"shape": [C, H, W], "means": one flat list per component, "stds", "weights",
    "conditional": true or false}; the last two may be left out (equal weights, false).

    Raises:
        ConfigError: neither a name nor a file of that form.
    """
    path = config.path
    if path in PRESETS:
        made = PRESETS[path]()
        return MixtureTeacher(made.means, made.stds, made.weights, device=device)
    try:
        content = json.loads(Path(path).read_text())
        means = torch.tensor(content["means"], dtype=torch.float64)
        return MixtureTeacher(
            means.reshape(len(means), *content["shape"]),
            torch.tensor(content["stds"], dtype=torch.float64),
            torch.tensor(content.get("weights", [1.0] * len(means)), dtype=torch.float64),
            bool(content.get("conditional", False)),
            device,
        )
    except FileNotFoundError as error:
        names = ", ".join(PRESETS)
        raise ConfigError(f"teacher.path={path} is neither a file nor one of: {names}") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"teacher.path={path} does not describe a mixture ({error!r})") from error
