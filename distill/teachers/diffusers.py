"""Flow-matching models saved by diffusers, from a local folder.

diffusers has noise at sigma = 1: x = sigma x_0 + (1 - sigma) x_1, time step 1000 sigma, and its
flow models predict x_0 - x_1. So sigma = 1 - t and v = -prediction. A model trained otherwise
(epsilon, v-prediction) cannot be told apart by its files and is the user's to know.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ConfigError, ImageSpec, check
from distill.networks.files import fingerprint, read_shapes
from distill.teachers.base import TeacherDescription
from distill.teachers.config import DiffusersConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


class DiffusersTeacher:
    """The velocity of a model (x, step [B], label [B] or None) -> x_0 - x_1, first channels first.

    The last row of its label table must be "none".
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        image: ImageSpec,
        fingerprint: str,
    ) -> None:
        self.model, self.image, self.fingerprint = model, image, fingerprint

    @torch.no_grad()
    def velocity(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """v(x, t, label)."""
        classes = self.image.num_classes
        rows = torch.where(label < 0, classes, label) if classes else None
        # A model with learned variance puts out twice the channels.
        return -self.model(x, 1000 * (1 - t), rows)[:, : self.image.channels]


# Classes of diffusers that are read, and the number of label classes by their config.json.
NUM_CLASSES: dict[str, Callable[[dict[str, Any]], int]] = {
    "UNet2DModel": lambda config: (config.get("num_class_embeds") or 1) - 1,
    "DiTTransformer2DModel": lambda config: config.get("num_embeds_ada_norm", 1000),
}


def describe_diffusers(config: DiffusersConfig) -> TeacherDescription:
    """What a folder with config.json and one safetensors file holds.

    Of `UNet2DModel` the labels are `num_class_embeds`, the last one "none". Whether the tensors are
    those of the model is seen when it is loaded; diffusers itself is not imported.

    Raises:
        ConfigError: diffusers is not installed, a file is missing or cut, or another class of
        model.
    """
    folder = Path(config.path)
    content = _read_config(folder / "config.json")
    kind = str(content.get("_class_name"))
    read_shapes(folder / WEIGHTS)
    check(
        kind in NUM_CLASSES,
        f"{folder} holds a {kind}; teacher.kind=diffusers reads {' and '.join(NUM_CLASSES)}",
    )
    size = content.get("sample_size")
    if not isinstance(size, int):
        raise ConfigError(
            f"{folder / 'config.json'}: sample_size={size} is not one number of pixels"
        )
    check(
        importlib.util.find_spec("diffusers") is not None,
        "teacher.kind=diffusers needs the package diffusers: pip install 'bowstring[diffusers]'",
    )
    image = ImageSpec(content["in_channels"], size, NUM_CLASSES[kind](content))
    return TeacherDescription(image, fingerprint(folder / WEIGHTS))


def load_diffusers(config: DiffusersConfig, device: torch.device | str) -> DiffusersTeacher:
    """The teacher of a folder.

    Raises:
        ConfigError: as `describe_diffusers`, and when the tensors are not those of the model.
    """
    description = describe_diffusers(config)
    network = _load_network(Path(config.path)).to(device).eval().requires_grad_(False)

    def model(x: Tensor, step: Tensor, rows: Tensor | None) -> Tensor:
        return network(x, timestep=step, class_labels=rows, return_dict=False)[0]

    return DiffusersTeacher(model, description.image, description.fingerprint)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: not a folder of a diffusers model") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("in_channels"), int):
        raise ConfigError(f"{path} does not describe a diffusers model")
    return config


def _load_network(folder: Path) -> Any:
    """The diffusers module of a folder."""
    # Optional and heavy, so not at the top: only this kind of teacher needs it.
    import diffusers

    kind = getattr(diffusers, _read_config(folder / "config.json")["_class_name"])
    try:
        return kind.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be opened by diffusers ({error})") from error
