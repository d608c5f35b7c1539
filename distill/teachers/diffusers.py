"""Models saved by diffusers, from a local folder of one model or of a pipeline.

diffusers has noise at sigma = 1: x = sigma x_0 + (1 - sigma) x_1, time step 1000 sigma, and its
flow models predict x_0 - x_1: time from data to noise. What a model was trained to predict stands
in the scheduler_config.json beside it, and is converted (`distill.teachers.conventions`); a model
without one counts as a flow model.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config import ConfigError, ImageSpec, check
from distill.networks.files import fingerprint, read_shapes
from distill.teachers.base import TeacherDescription, VelocityTeacher, check_none
from distill.teachers.config import DiffusersConfig
from distill.teachers.conventions import Convention, Converted, Model, convention_of, linear_betas
from distill.teachers.precision import prepared

STEM = "diffusion_pytorch_model"
SCHEDULER = "scheduler_config.json"
STEPS = 1000.0  # time steps of a flow model, at sigma = 1
FLOW = Convention(time="data_to_noise", unit=STEPS)
PREDICTED = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}

# Classes of diffusers that are read, and the rows of the label table by their config.json.
LABEL_ROWS: dict[str, Callable[[dict[str, Any]], int]] = {
    "UNet2DModel": lambda config: config.get("num_class_embeds") or 0,
    "DiTTransformer2DModel": lambda config: config.get("num_embeds_ada_norm", 1000) + 1,
}


def describe_diffusers(config: DiffusersConfig) -> TeacherDescription:
    """What a folder holds. The last label is "none", unless `teacher.num_classes` counts it too.

    Whether the tensors are those of the model is seen when it is loaded; diffusers itself is not
    imported.

    Raises:
        ConfigError: diffusers is not installed, a file is missing or cut, another class of model,
        or a convention that is not known here.
    """
    folder = _model_folder(Path(config.path))
    content = _read_config(folder / "config.json")
    kind = str(content.get("_class_name"))
    check(
        kind in LABEL_ROWS,
        f"{folder} holds a {kind}; teacher.kind=diffusers reads {' and '.join(LABEL_ROWS)}",
    )
    parts = _weight_files(folder)
    for part in parts:
        read_shapes(part)
    rows = LABEL_ROWS[kind](content)
    check(
        config.num_classes in (0, rows, rows - 1),
        f"teacher.num_classes={config.num_classes}, but {folder} has {rows} labels, counting one "
        'for "none"',
    )
    num_classes = config.num_classes or max(rows - 1, 0)
    check(
        importlib.util.find_spec("diffusers") is not None,
        "teacher.kind=diffusers needs the package diffusers: pip install 'bowstring[diffusers]'",
    )
    has_none = num_classes < rows or rows == 0
    check_none(config, has_none)
    found, said = _convention(folder)
    words = convention_of(config, found).words
    prints = [fingerprint(part) for part in parts]
    whole = prints[0] if len(prints) == 1 else sha256("".join(prints).encode()).hexdigest()
    return TeacherDescription(
        ImageSpec(content["in_channels"], _size(config, folder, content), num_classes),
        whole,
        has_none=has_none,
        notes=(f"{kind}, {words}{said}",),
    )


def load_diffusers(config: DiffusersConfig, device: torch.device | str) -> VelocityTeacher:
    """The teacher of a folder.

    Raises:
        ConfigError: as `describe_diffusers`, and when the tensors are not those of the model.
    """
    description = describe_diffusers(config)
    velocity = Converted(load_model(config, device), convention(config))
    return VelocityTeacher(velocity, description)


def convention(config: DiffusersConfig) -> Convention:
    """What the model of a folder predicts. Raises as `describe_diffusers`."""
    return convention_of(config, _convention(_model_folder(Path(config.path)))[0])


def load_model(config: DiffusersConfig, device: torch.device | str) -> Model:
    """The model (x, step [B], label [B]) -> prediction, first channels only, on `device`."""
    image = describe_diffusers(config).image
    folder = _model_folder(Path(config.path))
    frozen = _load_network(folder).to(device).eval().requires_grad_(False)
    network = prepared(frozen, config)
    return adapted(
        lambda x, step, rows: network(x, timestep=step, class_labels=rows, return_dict=False)[0],
        image,
    )


def adapted(network: Callable[[Tensor, Tensor, Tensor | None], Tensor], image: ImageSpec) -> Model:
    """A network of diffusers with our labels; one of learned variance has twice the channels."""

    def model(x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        classes = image.num_classes
        rows = torch.where(label < 0, classes, label) if classes else None
        return network(x, step, rows)[:, : image.channels].to(x.dtype)

    return model


# -----------------------------------------------------------------------------------------------
# Files


def _model_folder(path: Path) -> Path:
    """The folder of the model: `path`, the model's part of a pipeline, or the folder of a file."""
    folder = path.parent if path.is_file() else path
    if (folder / "model_index.json").is_file():
        for part in ("transformer", "unet"):
            if (folder / part / "config.json").is_file():
                return folder / part
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if not isinstance(config.get("in_channels"), int):
        raise ConfigError(f"{path} does not describe a diffusers model")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: not a folder of a diffusers model") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    check(isinstance(content, dict), f"{path} does not describe a diffusers model")
    return dict(content)


def _weight_files(folder: Path) -> list[Path]:
    """The model's safetensors: one file or its parts, plain or of the only variant there is."""
    plain = folder / f"{STEM}.safetensors"
    indices = sorted(folder.glob(f"{STEM}.safetensors.index*.json"))
    variants = sorted(folder.glob(f"{STEM}.*.safetensors"))
    if plain.is_file():
        return [plain]
    if indices:
        try:
            names = set(_read_json(indices[0])["weight_map"].values())
        except (KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{indices[0]} is no index of weights ({error!r})") from error
        return [folder / name for name in sorted(names)]
    check(
        len(variants) == 1,
        f"{plain} is missing"
        + (f"; there are variants: {', '.join(v.name for v in variants)}" if variants else "")
        + "; save the model by save_pretrained(FOLDER, safe_serialization=True)",
    )
    return variants


def _size(config: DiffusersConfig, folder: Path, content: dict[str, Any]) -> int:
    size = config.image_size or content.get("sample_size")
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise ConfigError(
            f"{folder / 'config.json'}: sample_size={size} is not one number of pixels; set "
            "teacher.image_size if the model makes square images"
        )
    return size


def _load_network(folder: Path) -> Any:
    """The diffusers module of a folder."""
    # Optional and heavy, so not at the top: only this kind of teacher needs it.
    import diffusers

    kind = getattr(diffusers, _read_config(folder / "config.json")["_class_name"])
    first = _weight_files(folder)[0].name.removeprefix(STEM).split(".")
    variant = first[1].split("-")[0] if len(first) > 2 else None
    try:
        return kind.from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            variant=variant,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be opened by diffusers ({error})") from error


# -----------------------------------------------------------------------------------------------
# Convention


def _convention(folder: Path) -> tuple[Convention, str]:
    """The convention of a model by the scheduler beside it, and where that is from, in words.

    Raises:
        ConfigError: a scheduler whose models are not known here.
    """
    places = (folder / SCHEDULER, folder.parent / "scheduler" / SCHEDULER)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return FLOW, ", since no scheduler_config.json says otherwise"
    said = _read_json(path)
    kind, predicted = str(said.get("_class_name", "")), said.get("prediction_type", "epsilon")
    is_flow = "FlowMatch" in kind or said.get("use_flow_sigmas") or predicted == "flow_prediction"
    if is_flow:
        return FLOW, f", as {path.name} says"
    check(
        predicted in PREDICTED and not kind.startswith("EDM"),
        f"{path} says {kind} and prediction_type={predicted}, which is not known here; a model "
        "that predicts epsilon, sample or v_prediction over steps, or a flow, is",
    )
    convention = Convention(
        "ddpm", PREDICTED[predicted], "data_to_noise", _betas(path, said), STEPS
    )
    return convention, f", as {path.name} says"


def _betas(path: Path, said: dict[str, Any]) -> tuple[float, ...]:
    """The noise of every step, as a scheduler of diffusers makes it."""
    first, last = said.get("beta_start", 1e-4), said.get("beta_end", 0.02)
    count, schedule = said.get("num_train_timesteps", 1000), said.get("beta_schedule", "linear")
    check(
        not said.get("rescale_betas_zero_snr"),
        f"{path} says rescale_betas_zero_snr, which is not known here",
    )
    if isinstance(trained := said.get("trained_betas"), list):
        return tuple(float(beta) for beta in trained)
    match schedule:
        case "linear":
            return linear_betas(first, last, count)
        case "scaled_linear":
            return tuple(b**2 for b in linear_betas(first**0.5, last**0.5, count))
        case "squaredcos_cap_v2":

            def kept(u: float) -> float:
                return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

            steps = range(count)
            return tuple(min(1 - kept((i + 1) / count) / kept(i / count), 0.999) for i in steps)
    raise ConfigError(f"{path} says beta_schedule={schedule}, which is not known here")
