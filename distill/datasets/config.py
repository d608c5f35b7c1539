"""Settings of the real images. No torch."""

from dataclasses import dataclass

from omegaconf import MISSING

from distill.config import ImageSpec, check, check_choice, check_positive, free
from distill.datasets.sets import SETS


@dataclass
class DataConfig:
    """The real images a teacher is trained on and a student is compared with.

    `latents` without a path has none: the run's teacher comes from elsewhere, and only distances to
    it are taken. With one it is a folder that `bowstring encode` wrote.
    """

    name: str = MISSING  # a row of distill.datasets.sets
    # A folder of pictures, .zip, .tar, .parquet, .npz; fashion: with its files, "" is the usual one
    path: str = free("")
    channels: int = MISSING  # 1 grey, 3 RGB, others a latent space
    size: int = MISSING  # height = width, pixels, after padding or cropping
    num_classes: int = 0  # 0: unconditional
    crop: str = "none"  # none (a black border at most) | adm | celeba (distill.datasets.pictures)
    flips: bool = False  # a teacher's training sees each image mirrored with chance 1/2
    other_modes: str = "convert"  # of grey, transparent, CMYK .. images: convert | skip | refuse
    broken: str = "refuse"  # of files that cannot be decoded: refuse | skip
    first_label: int = -1  # of the first class; -1: 0, or 1 where labels can mean nothing else
    workers: int = free(2)  # processes that decode for a rank; 0: the rank itself
    autoencoder: str = free("")  # folder; decodes latents for pictures, "" is as they were encoded
    manifest: str = free("")  # folder; "" is data.path and `.manifest`

    def __post_init__(self) -> None:
        check_choice("data.name", self.name, tuple(SETS))
        check_choice("data.crop", self.crop, ("none", "adm", "celeba"))
        check_choice("data.other_modes", self.other_modes, ("convert", "skip", "refuse"))
        check_choice("data.broken", self.broken, ("refuse", "skip"))
        check(self.workers >= 0, f"data.workers={self.workers} must be 0 or more")
        check_positive("data", channels=self.channels, size=self.size)
        check(
            SETS[self.name].has_images or not self.image.is_picture,
            f"data.name=latents with data.channels={self.channels}: grey and RGB images are "
            "compared with real ones; set data.name=npz and data.path",
        )

    @property
    def has_latents(self) -> bool:
        """Whether the images are latents that were encoded before."""
        return self.name == "latents" and bool(self.path)

    @property
    def has_images(self) -> bool:
        """Whether a teacher can be trained on it."""
        return SETS[self.name].has_images or self.has_latents

    @property
    def image(self) -> ImageSpec:
        """Shape and classes of the images."""
        return ImageSpec(self.channels, self.size, self.num_classes)
