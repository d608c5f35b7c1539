"""Few-step sampling: x <- G(x, t_n, t_{n+1}) at the times of `sampler_times`.

    from distill.sample import load_student

    student = load_student("runs/digits")
    images = student.sample(16, nfe=2)

Image i of a seed is always the same: its noise and label come from (seed, i), so it does not
matter how many are drawn or in which batches.
"""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ConfigError, ImageSpec, check
from distill.datasets.config import DataConfig
from distill.datasets.decode import to_pictures, to_uint8
from distill.export import student as export
from distill.flow import paths
from distill.flow.noise import sample_labels, sample_noise
from distill.flow.times import DRILLED, EVEN, sampler_times
from distill.networks.files import load_model
from distill.networks.layers import AbstractNetwork
from distill.report.pictures import tile, write_npz, write_png
from distill.run.files import RunDir

# One integer or many, of Python, numpy or torch; None. What else comes is refused in a sentence
Labels: TypeAlias = Any


@torch.no_grad()
def few_step(
    u: paths.MeanVelocity,
    noise: Float[Tensor, "B *S"],
    labels: Int[Tensor, "B"],
    nfe: int,
    middle: float = EVEN,
) -> Float[Tensor, "B *S"]:
    """x_1 after `nfe` jumps from `noise`, at the times of `sampler_times`: `nfe` evaluations.

    A jump is summed in float64 and rounded once, over sigma = 1 - t, as diffusers'
    FlowMapEulerDiscreteScheduler does: there an exported student gives the same bits.
    """
    wide = torch.float32 if noise.device.type == "mps" else torch.float64  # which has no other
    x = noise
    for t, s in itertools.pairwise(sampler_times(nfe, middle)):
        u_mean = u(x, x.new_full((len(x),), t), x.new_full((len(x),), s), labels)
        x = (x.to(wide) + ((1 - t) - (1 - s)) * u_mean.to(wide)).to(x.dtype)
    return x


def choose_labels(labels: Labels, image: ImageSpec, seed: int, ids: np.ndarray) -> Int[Tensor, "B"]:
    """One label per sample id: drawn from (seed, id) when `labels` is None, else repeated in turn.

    Raises:
        ConfigError: no integers, such as a prompt, or a label outside 0 .. num_classes - 1 (-1,
        "none", is allowed).
    """
    if labels is None:
        return torch.from_numpy(sample_labels(seed, ids, image.num_classes))
    classes = f"0 to {image.num_classes - 1}, or -1 for none" if image.num_classes else "-1 only"
    given = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels).reshape(-1)
    wanted = given.tolist()
    check(len(wanted) > 0, "labels=[] is empty; leave it out to draw labels at random")
    check(
        np.issubdtype(given.dtype, np.integer),
        f"labels={labels!r} must be integers: this model takes classes, {classes}",
    )
    for label in wanted:
        check(
            -1 <= label < image.num_classes,
            f"labels={wanted}: {label} is not a class of this model; it has {classes}",
        )
    return torch.tensor(wanted, dtype=torch.int64)[torch.from_numpy(ids % len(wanted))]


@dataclass(frozen=True)
class Student:
    """A distilled model that is ready to sample.

    Attributes:
        network: u(x, t, s, label).
        image: shape and classes.
        meta: what `model.json` says about the model.
        device: where it runs.
    """

    network: AbstractNetwork
    image: ImageSpec
    meta: dict[str, Any]
    device: torch.device

    @property
    def middle(self) -> float:
        """Where the second of two jumps begins."""
        return self.meta.get("middle", DRILLED)

    def sample(
        self, num: int, nfe: int = 1, seed: int = 0, labels: Labels = None, batch_size: int = 256
    ) -> Tensor:
        """Images [num, C, H, W] uint8 on the CPU, at `nfe` network evaluations each.

        `labels` are repeated in turn; None draws them from the seed. A model whose channels are
        not those of a picture (a latent space) gives float32 instead.

        Raises:
            ConfigError: num, nfe or a label out of range.
        """
        images, _ = self.sample_with_labels(num, nfe, seed, labels, batch_size)
        return images

    def sample_with_labels(
        self, num: int, nfe: int = 1, seed: int = 0, labels: Labels = None, batch_size: int = 256
    ) -> tuple[Tensor, Tensor]:
        """The images of `sample` and the label [num] of each."""
        check(num > 0, f"num={num} must be above 0")
        check(nfe > 0, f"nfe={nfe} must be above 0")
        chosen = choose_labels(labels, self.image, seed, np.arange(num))
        parts = []
        for ids in torch.arange(num).split(batch_size):
            noise = torch.from_numpy(sample_noise(seed, ids.numpy(), self.image.shape))
            x = self.jump(noise, chosen[ids], nfe)
            parts.append(to_uint8(x) if self.image.is_picture else x)
        return torch.cat(parts), chosen

    def jump(self, noise: Float[Tensor, "B C H W"], labels: Int[Tensor, "B"], nfe: int) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], float32 on the CPU, after `nfe` jumps from `noise`."""
        place = self.device
        return few_step(self.network, noise.to(place), labels.to(place), nfe, self.middle).cpu()

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """`folder`, now a model folder: `load_student` opens it, and so does `teacher=native`.

        Raises:
            ConfigError: it is there already, unless `overwrite`, or it is no export.
        """
        out = Path(folder)
        export.check_place(out, overwrite)
        meta = {key: value for key, value in self.meta.items() if key not in ("network", "image")}
        return export.save_trained(out, self.network, meta)


def load_student(path: str | Path, device: str | torch.device | None = None) -> Student:
    """The student of a run, from its newest checkpoint that verifies, or that in a folder made by
    `bowstring export`; on a GPU when there is one. Nothing is written.

    Raises:
        ConfigError: the run has no checkpoint yet; the folder holds no whole model, or one that is
        no student.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = RunDir(Path(path))
    if run.identity.is_file() or run.config.is_file():
        trained = export.read_student(run)
        network = trained.network.to(device)
        about = {"network": asdict(network.config), "image": asdict(network.image)}
        return Student(network, network.image, about | trained.meta, device)
    network, meta = load_model(Path(path), device)
    if meta.get("kind") != "student":
        raise ConfigError(f"{path} holds a {meta.get('kind', 'model of unknown kind')}, no student")
    image = ImageSpec(**meta["image"])
    return Student(network.eval().requires_grad_(False), image, meta, device)


def sample_run(
    run: RunDir,
    nfe: int = 1,
    seed: int = 0,
    labels: Labels = None,
    num: int = 64,
    out: Path | None = None,
    data: DataConfig | None = None,
) -> Path:
    """Path of an npz of `num` images of the last verified checkpoint; a PNG grid lies beside it.

    The npz holds images [num, C, H, W] (uint8; float32 for a latent space, then without a PNG),
    labels, seed and nfe. `data`, the run's, may name an autoencoder that decodes its latents.
    `out` is the folder, by default run/samples.

    Raises:
        ConfigError: the run has no checkpoint yet, or a setting is out of range.
    """
    student = load_student(export.latest_student(run))
    images, chosen = student.sample_with_labels(num, nfe, seed, labels)
    decode = None if student.image.is_picture or data is None else to_pictures(data, student.device)
    images = decode(images) if decode else images
    stem = (out or run.samples) / f"nfe{nfe}_seed{seed}"
    path = stem.with_suffix(".npz")
    arrays: dict[str, np.ndarray | np.generic] = {
        "images": images.numpy(),
        "labels": chosen.numpy(),
        "seed": np.int64(seed),
        "nfe": np.int64(nfe),
    }
    write_npz(path, arrays)
    if images.dtype == torch.uint8:
        write_png(stem.with_suffix(".png"), tile(images.numpy(), columns=max(1, round(num**0.5))))
    return path
