"""Export: a folder that diffusers opens, in a process without Bowstring.

    model_index.json         the pipeline and its parts
    bowstring_pipeline.py    the pipeline: jumps from sigma to sigma
    transformer/ or unet/    config.json, safetensors (sharded when large), bowstring_NETWORK.py
    scheduler/               FlowMapEulerDiscreteScheduler, of diffusers itself
    README.md                the model card (`distill.export.card`)

diffusers has noise at sigma = 1: sigma = 1 - t, and its flow maps predict noise - data. No class of
it has a second time for images, so network and pipeline lie in the folder as code, and are opened
with `trust_remote_code=True`.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import numpy as np
import torch

from distill.config import ImageSpec, LossyExport, check
from distill.export.card import Use, write_card
from distill.export.source import standalone
from distill.export.student import TrainedStudent
from distill.flow.noise import sample_noise
from distill.flow.times import sampler_times
from distill.networks.layers import AbstractNetwork
from distill.run.files import RunDir, replaced, write_atomic, write_json
from distill.sample import few_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIPELINE, MODEL = "FlowMapPipeline", "FlowMapModel"
INDEX, CODE = "model_index.json", "bowstring_pipeline.py"
PARTS = {"dit": "transformer", "unet": "unet"}  # name of the network in the pipeline
COMPARED = (1, 2, 4, 8)  # evaluations
SHARD = "5GB"


def export_diffusers(
    run: RunDir,
    student: TrainedStudent,
    out: Path,
    dtype: str = "fp32",
    license_id: str = "unknown",
) -> Path:
    """`out`, now a folder that `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)`
    opens; its images are those of `distill.sample`, bit for bit in the same precision.

    Raises:
        ConfigError: diffusers is not installed, or too old.
        LossyExport: the images are others. Nothing was written.
    """
    _check_installed()
    import diffusers

    network = student.network.to(DTYPES[dtype])
    name = network.config.name
    check(name in PARTS, f"--format diffusers takes {' and '.join(PARTS)}, not student.name={name}")
    part = PARTS[name]
    with replaced(out) as folder:
        code = folder / part / f"bowstring_{name}.py"
        write_atomic(code, _model_source(network).encode())
        with _loaded(code) as module:
            kind = getattr(module, MODEL)
            settings = asdict(network.config)
            image = network.image
            model = kind(image.channels, image.size, image.num_classes, settings)
            model.load_state_dict(network.state_dict())
            if dtype != "fp32":
                model.to(DTYPES[dtype])
            model.save_pretrained(str(folder / part), max_shard_size=SHARD)
        scheduler = diffusers.FlowMapEulerDiscreteScheduler()
        scheduler.save_pretrained(str(folder / "scheduler"))
        shutil.copyfile(Path(__file__).parent / "templates" / CODE, folder / CODE)
        parts = {name: [None, None] for name in (*PARTS.values(), "vae")}
        index = {
            "_class_name": [CODE.removesuffix(".py"), PIPELINE],
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", type(scheduler).__name__],
            **parts,
            part: [code.stem, MODEL],
            "sigmas": _uneven_sigmas(student.middle),
        }
        write_json(folder / INDEX, index)
        _check_images(folder, index, part, network, student.middle)
        write_card(folder, run, student, _use(network), license_id)
    return out


def _use(network: AbstractNetwork) -> Use:
    """Five lines that draw images."""
    dtype = str(network.last_layer.dtype)
    image = network.image
    which = f"class_labels={list(range(min(4, image.num_classes)))}" if image.num_classes else ""
    how = (
        "import torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True, dtype={dtype})\n"
        f"images = pipe({which or 'batch_size=4'}, num_inference_steps=2).images\n"
        'images[0].save("image.png")'
    )
    if not image.is_picture:
        how = how.replace("dtype=", "vae=VAE, dtype=")
    return Use("diffusers", how, dtype=dtype.removeprefix("torch."))


def _check_installed() -> None:
    """Raises ConfigError unless a diffusers with the scheduler is there."""
    found = util.find_spec("diffusers") is not None
    if found:
        import diffusers

        found = "FlowMapEulerDiscreteScheduler" in dir(diffusers)
    check(
        found,
        "--format diffusers needs the package diffusers, 0.42 or newer: "
        "pip install 'bowstring[diffusers]'",
    )


def _uneven_sigmas(middle: float) -> dict[str, list[float]]:
    """Sigmas by number of evaluations, where our sampler's times are not evenly spaced."""
    found = {}
    for nfe in range(1, 17):
        times = sampler_times(nfe, middle)
        if times != [n / nfe for n in range(nfe + 1)]:
            found[str(nfe)] = [1 - t for t in times[:-1]]
    return found


def _model_source(network: AbstractNetwork) -> str:
    """The file with the network's class, as diffusers takes it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.export"), keep_trailing_newline=True
    )
    source = standalone(ImageSpec, type(network))
    return environment.get_template("model.py.jinja").render(
        version=metadata.version("bowstring"),
        imports=source.imports,
        body=source.body,
        network=type(network).__name__,
        name=MODEL,
    )


@contextmanager
def _loaded(path: Path) -> Iterator[ModuleType]:
    """A file as a module, under a name of its own while it is in use."""
    name = f"_bowstring_export_{path.stem}"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def _check_images(
    folder: Path, index: dict[str, Any], part: str, network: AbstractNetwork, middle: float
) -> None:
    """Opens the folder and compares what it draws with `few_step` of the network.

    Raises:
        LossyExport: they differ in a bit.
    """
    from diffusers import FlowMapEulerDiscreteScheduler

    with _loaded(folder / part / f"{index[part][0]}.py") as code, _loaded(folder / CODE) as pipe:
        dtype = network.last_layer.dtype
        model = getattr(code, MODEL).from_pretrained(
            str(folder / part), torch_dtype=dtype, low_cpu_mem_usage=False
        )
        scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(str(folder / "scheduler"))
        parts = {part: model.eval(), "scheduler": scheduler, "sigmas": index["sigmas"]}
        pipeline = getattr(pipe, PIPELINE)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.from_numpy(sample_noise(0, np.arange(2), network.image.shape))
        labels = [network.image.num_classes - 1, -1]
        for nfe in COMPARED:
            expected = few_step(network, noise, torch.tensor(labels), nfe, middle)
            (got,) = pipeline(
                labels, num_inference_steps=nfe, latents=noise, output_type="latent",
                return_dict=False,
            )  # fmt: skip
            if not torch.equal(got, expected):
                worst = float((got - expected).abs().max())
                raise LossyExport(
                    f"{folder} draws other images than the trained network at {nfe} evaluations, "
                    f"off by {worst:.1e}; nothing was written"
                )
