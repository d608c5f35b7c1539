"""Distances to the teacher's trajectories and between image sets. Only importer of torch_fidelity.

With x_0 the noise, x_1 the teacher's fine ODE end point and G^N the student's N jumps:

    distance_to_teacher = sum |G^N(x_0) - x_1|^2 / sum |x_1 - x_0|^2   (ratio of sums over samples)
    Fréchet             = |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))     (moments of features)
    kernel distance     = unbiased MMD^2 with the kernel (f . f' / d + 1)^3     (Binkowski 2018)

A new metric is a function here and a row of `METRICS`: its numbers stand in every row of
results.json.

torch-fidelity's own cache is not used (its key knows neither weights nor sample count), and
features are turned to float64 before any moment, whatever dtype the extractor has. Only Inception
features make a Fréchet distance a FID.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor
from torch_fidelity import feature_extractor_base, metric_fid, metric_kid, registry, utils

from distill.evaluation import config, inception
from distill.sample import to_uint8

INCEPTION = "inception-v3-compat"
PIXELS = "bowstring-pixels"
PIXELS_DEFINITION = "uint8 pixels [C, H, W], flattened, divided by 255, float64"
# Subsets of the kernel distance: the usual number for Inception, fewer and smaller where features
# are cheap and few.
KID_SUBSETS = {"inception": (100, 1000), "pixels": (10, 500)}
KID_SEED = 2020
BATCH = 100  # images an extractor takes at once
HELD = 50_000  # real images at most whose features stay in memory, for the kernel distance


def relative_distance(
    x: Float[Tensor, "N *S"], reference: Float[Tensor, "N *S"], noise: Float[Tensor, "N *S"]
) -> float:
    """sum |x - reference|^2 / sum |reference - noise|^2 in float64. 0: the same; 1: did nothing."""
    error = (x.double() - reference.double()).square().flatten(1).sum(dim=1)
    transport = (reference.double() - noise.double()).square().flatten(1).sum(dim=1)
    return float(error.sum() / transport.sum())


class PixelExtractor(feature_extractor_base.FeatureExtractorBase):
    """Flattened pixels: for images too small for a network that looks at photographs."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the features."""
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The same features for every metric."""
        return "pixels"

    @staticmethod
    def can_be_compiled() -> bool:
        """There is nothing to compile."""
        return False

    def forward(self, input: UInt8[Tensor, "B C H W"]) -> tuple[Float64[Tensor, "B F"]]:
        """One row of pixels in [0, 1] per image."""
        return (input.flatten(1).double() / 255,)


registry.register_feature_extractor(PIXELS, PixelExtractor)


class FeatureDistance:
    """Fréchet and kernel distance of image sets to one set of real images.

    Attributes:
        description: extractor name, sha256, dtype of its features and the settings of the kernel
        distance.
    """

    def __init__(
        self,
        extractor: config.ExtractorConfig,
        real: Iterable[UInt8[Tensor, "B C H W"]],
        device: torch.device,
    ) -> None:
        """`real` are the real images, some at a time."""
        self._device = device
        if extractor.name == "inception":
            digest, registered = inception.check_inception(extractor.weights), INCEPTION
        else:
            digest, registered = sha256(PIXELS_DEFINITION.encode()).hexdigest(), PIXELS
        layer = {INCEPTION: "2048", PIXELS: "pixels"}[registered]
        self._extractor = utils.create_feature_extractor(
            registered,
            [layer],
            cuda=device.type == "cuda",
            feature_extractor_weights_path=extractor.weights or None,
            verbose=False,
        )
        self._subsets, self._subset_size = KID_SUBSETS[extractor.name]
        self._real, self._real_moments, dtype = self._reference(real)
        self.description: dict[str, Any] = {
            "name": extractor.name,
            "sha256": digest,
            "features": self._real.shape[1],
            "feature_dtype": dtype,
            "moment_dtype": "float64",
            "kid_subsets": self._subsets,
            "kid_subset_size": self._subset_size,
        }

    @torch.no_grad()
    def _features(self, images: Iterable[Tensor]) -> tuple[Float64[Tensor, "N F"], str]:
        """Features in float64 on the CPU, and the dtype the extractor gave them in."""
        rows = []
        for part in images:
            part = part.expand(-1, 3, -1, -1) if self.rgb_only and part.shape[1] == 1 else part
            rows.append(self._extractor(part.to(self._device))[0].cpu())
        return torch.cat(rows).double(), str(rows[0].dtype).removeprefix("torch.")

    def _reference(
        self, real: Iterable[Tensor]
    ) -> tuple[Float64[Tensor, "N F"], dict[str, np.ndarray], str]:
        """Features of the first `HELD` real images, moments of those of all, and their dtype."""
        held, moments, count, dtype = None, None, 0, ""
        real = iter(real)
        while part := list(itertools.islice(real, HELD // BATCH)):
            features, dtype = self._features(part)
            found = metric_fid.fid_features_to_statistics(features)
            moments = found if moments is None else joint(moments, count, found, len(features))
            held, count = features if held is None else held, count + len(features)
        assert held is not None and moments is not None, "a data set has images"
        return held, moments, dtype

    @property
    def rgb_only(self) -> bool:
        """Whether the extractor wants three channels; grey images are then repeated."""
        return not isinstance(self._extractor, PixelExtractor)

    def compare(self, images: UInt8[Tensor, "N C H W"]) -> dict[str, float]:
        """ "frechet", "kid" and "kid_std" between `images` and the real ones. Deterministic."""
        features, _ = self._features(images.split(BATCH))
        return {
            "frechet": frechet(metric_fid.fid_features_to_statistics(features), self._real_moments),
            **kernel_distance(features, self._real, self._subsets, self._subset_size),
        }


def joint(
    moments: dict[str, np.ndarray], n: int, other: dict[str, np.ndarray], m: int
) -> dict[str, np.ndarray]:
    """Mean and unbiased covariance of n and m samples together (Chan, Golub & LeVeque, 1979)."""
    apart = other["mu"] - moments["mu"]
    squares = (n - 1) * moments["sigma"] + (0 if m == 1 else (m - 1) * other["sigma"])
    squares += np.outer(apart, apart) * (n * m / (n + m))
    return {"mu": moments["mu"] + apart * (m / (n + m)), "sigma": squares / (n + m - 1)}


def frechet(moments: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Fréchet distance of two Gaussians with moments {"mu": [F], "sigma": [F, F]}, float64."""
    for array in (*moments.values(), *other.values()):
        assert array.dtype == np.float64
    return float(
        metric_fid.fid_statistics_to_metric(moments, other, verbose=False)[
            metric_fid.KEY_METRIC_FID
        ]
    )


def kernel_distance(
    features: Float64[Tensor, "N F"], other: Float64[Tensor, "M F"], subsets: int, subset_size: int
) -> dict[str, float]:
    """Mean ("kid") and spread ("kid_std") over random subsets of the unbiased MMD^2. 0 on average
    for equal sets."""
    size = min(subset_size, len(features), len(other))
    result = metric_kid.kid_features_to_metric(
        features, other, kid_subsets=subsets, kid_subset_size=size, rng_seed=KID_SEED, verbose=False
    )
    return {
        "kid": result[metric_kid.KEY_METRIC_KID_MEAN],
        "kid_std": result[metric_kid.KEY_METRIC_KID_STD],
    }


def distance_name(extractor: str, num: int) -> str:
    """What the Fréchet distance may be called: FID needs Inception features, FID-50k 50,000
    images."""
    if extractor != "inception":
        return f"Fréchet distance ({extractor})"
    return "FID-50k" if num == 50_000 else f"FID (n = {num:,})"


# -----------------------------------------------------------------------------------------------
# All that is measured of one sampler


@dataclass(frozen=True)
class Drawn:
    """Samples, and what they are compared with.

    Attributes:
        x: end points of a sampler, [N, C, H, W] in [-1, 1].
        reference: those of the teacher's fine solution from the same noise.
        noise: where both started.
        features: distances to the real images; None where there are none.
        to_pictures: bytes of `x`: latents are decoded.
    """

    x: Float[Tensor, "N C H W"]
    reference: Float[Tensor, "N C H W"]
    noise: Float[Tensor, "N C H W"]
    features: FeatureDistance | None
    to_pictures: Callable[[Tensor], UInt8[Tensor, "N C H W"]] = to_uint8


def distance_to_teacher(drawn: Drawn) -> dict[str, float]:
    """`relative_distance` to the teacher's fine solution."""
    distance = relative_distance(drawn.x, drawn.reference, drawn.noise)
    return {"distance_to_teacher": distance}


def distances_to_data(drawn: Drawn) -> dict[str, float]:
    """Fréchet and kernel distance to the real images, where there are any."""
    return drawn.features.compare(drawn.to_pictures(drawn.x)) if drawn.features else {}


METRICS: tuple[Callable[[Drawn], dict[str, float]], ...] = (distance_to_teacher, distances_to_data)


def measure(drawn: Drawn) -> dict[str, float]:
    """The numbers of all metrics, by name."""
    return {name: value for metric in METRICS for name, value in metric(drawn).items()}
