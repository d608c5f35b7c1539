"""A student in diffusers, in a process that has no Bowstring: the same images, bit for bit."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from distill.checkpoint import commit as checkpoint
from distill.config import ConfigError, ImageSpec, LossyExport, TrainConfig
from distill.engine.engine import TorchEngine
from distill.export import build, diffusers
from distill.export.build import export_student
from distill.export.student import read_student
from distill.flow.noise import sample_labels, sample_noise
from distill.flow.times import sampler_times
from distill.networks.layers import AbstractNetwork
from distill.run.files import RunDir
from distill.sample import Student
from distill.testing import random_network, write_tiny_record

# diffusers takes ten seconds to import on an idle core, here and in the process without Bowstring.
pytestmark = pytest.mark.timeout(600)

NFE, COUNT, SEED = (1, 2, 4, 8), 3, 5
# The first was drilled on the jumps of an uneven sampler.
STUDENTS = {  # network, images, precision
    "dit": ("dit", ImageSpec(1, 8, 10), "fp32"),
    "unet": ("unet", ImageSpec(3, 8, 4), "fp32"),
    "without classes": ("unet", ImageSpec(1, 8, 0), "fp32"),
    "latents": ("dit", ImageSpec(4, 8, 10), "fp32"),
    "bf16": ("dit", ImageSpec(1, 8, 10), "bf16"),
}

# What somebody does who has torch and diffusers.
OPEN = """
import json, sys
from importlib.abc import MetaPathFinder

class Nowhere(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("distill", "cluster"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nowhere())
import numpy as np, torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMapEulerDiscreteScheduler

vae = dict(latent_channels=4, block_out_channels=[4, 8], norm_num_groups=2)
vae |= dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is FlowMapEulerDiscreteScheduler
    network = pipe.transformer or pipe.unet
    assert network.dtype == dtype and not network.training
    given = np.load(folder + ".npz")
    noise, labels = torch.from_numpy(given["noise"]), given["labels"].tolist()
    for nfe in given["nfe"].tolist():
        draw = dict(class_labels=labels, latents=noise, num_inference_steps=nfe)
        latents = pipe(**draw, output_type="latent").images.numpy()
        found[f"{name} {nfe}"] = bool((latents == given[f"latents_{nfe}"]).all())
        if name == "latents":
            continue
        pictures = [np.asarray(picture) for picture in pipe(**draw).images]
        pictures = np.stack([p[None] if p.ndim == 2 else p.transpose(2, 0, 1) for p in pictures])
        found[f"{name} {nfe}"] &= bool((pictures == given[f"pictures_{nfe}"]).all())
    if name == "latents":
        try:
            pipe(batch_size=1)
        except ValueError as error:
            found["latents without a vae"] = str(error)
        pipe.register_modules(vae=AutoencoderKL(**vae))
        (picture,) = pipe(batch_size=1).images
        found["decoded"] = picture.size
    found[f"{name} seeded"] = [
        bool((a == b).all())
        for a, b in zip(*(
            pipe(batch_size=2, generator=torch.manual_seed(0), output_type="latent").images
            for _ in range(2)
        ))
    ]
    try:
        pipe(class_labels=[network.config.num_classes])
    except ValueError as error:
        found[f"{name} refuses"] = str(error)
print(json.dumps(found))
"""


def run_of(root: Path, network: AbstractNetwork, objective: str = "traflow") -> RunDir:
    """A run whose one checkpoint holds `network`, which is frozen then."""
    run = RunDir(root)
    engine = TorchEngine(network, TrainConfig(), torch.device("cpu"))
    snapshot = checkpoint.take_snapshot(1, engine, {"seed": 0})
    checkpoint.commit(run.checkpoints, snapshot, engine, keep_last=2)
    identity = {
        "student": asdict(network.config),
        "data": {"name": "latents", **asdict(network.image)},
        "objective": {"name": objective},
    }
    write_tiny_record(run, identity, teacher="ab" * 32)
    network.requires_grad_(False)
    return run


def network_of(name: str, image: ImageSpec) -> AbstractNetwork:
    """A random one, whose positions are not the constructor's if it has any."""
    network = random_network(name, image).float()
    for buffer in network.buffers():
        buffer.mul_(1.1)
    return network.eval()


def draw(network: AbstractNetwork, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    """Noise and labels, and what `Student` makes of them."""
    image, ids = network.image, np.arange(COUNT)
    student = Student(network, image, meta, torch.device("cpu"))
    latent = Student(
        network, ImageLatent(*image.shape[:2], image.num_classes), meta, student.device
    )
    given = {
        "noise": sample_noise(SEED, ids, image.shape),
        "labels": sample_labels(SEED, ids, image.num_classes),
        "nfe": np.array(NFE),
    }
    for nfe in NFE:
        given[f"pictures_{nfe}"] = student.sample(COUNT, nfe, SEED).numpy()
        given[f"latents_{nfe}"] = latent.sample(COUNT, nfe, SEED).numpy()
    return given


class ImageLatent(ImageSpec):
    """Images that are given as they are, not as pixels."""

    is_picture = False


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An export of each of STUDENTS, and beside it what it is to draw."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    for key, (name, image, dtype) in STUDENTS.items():
        objective = "traflow_summed" if key == "dit" else "traflow"
        run = run_of(root / f"run {key}", network_of(name, image), objective)
        made[key] = export_student(run, "diffusers", root / key, False, dtype, "mit")
        student = read_student(run)
        network = student.network.to(diffusers.DTYPES[dtype])
        np.savez(f"{made[key]}.npz", **draw(network, student.meta))
    return made


@pytest.fixture(scope="module")
def seen(folders, tmp_path_factory) -> dict:
    """What a process without Bowstring finds in them."""
    given = json.dumps({key: str(folder) for key, folder in folders.items()})
    home = tmp_path_factory.mktemp("home")  # where diffusers copies the code of a folder
    done = subprocess.run(
        [sys.executable, "-c", OPEN, given],
        env=os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("nfe", NFE)
@pytest.mark.parametrize("key", STUDENTS)
def test_images_are_those_of_the_student_bit_for_bit(seen, key, nfe):
    assert seen[f"{key} {nfe}"]


def test_latents_are_given_or_decoded(seen):
    assert seen["latents without a vae"].endswith("load a vae, or set output_type='latent'")
    assert seen["decoded"] == [16, 16]


@pytest.mark.parametrize("key", STUDENTS)
def test_a_generator_repeats_and_a_class_that_is_none_is_refused(seen, key):
    assert seen[f"{key} seeded"] == [True, True]
    classes = STUDENTS[key][1].num_classes
    assert seen[f"{key} refuses"].startswith(f"class_labels=[{classes}] must be 1 numbers from -1")


def test_large_weights_are_sharded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers, "SHARD", "20KB")
    run = run_of(tmp_path / "run", network_of("dit", ImageSpec(1, 8, 10)))
    folder = export_student(run, "diffusers", tmp_path / "out", False, "fp32", "mit")
    index = json.loads(
        (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = set(index["weight_map"].values())
    assert len(files) > 1 and all((folder / "transformer" / name).is_file() for name in files)


def test_the_folder_has_its_familys_names_and_a_card(folders):
    assert (folders["dit"] / "transformer/bowstring_dit.py").is_file()
    assert (folders["unet"] / "unet/bowstring_unet.py").is_file()
    config = json.loads((folders["dit"] / "transformer/config.json").read_text())
    assert (config["in_channels"], config["sample_size"], config["num_classes"]) == (1, 8, 10)
    index = json.loads((folders["dit"] / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    assert index["sigmas"] == {"2": [1.0, 0.25]}
    assert json.loads((folders["unet"] / "model_index.json").read_text())["sigmas"] == {}
    card = ModelCard.load(folders["dit"] / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")


def test_times_that_diffusers_hands_on_are_the_samplers_to_the_bit():
    """t -> sigma = 1 - t -> 1000 sigma -> t, in float64, then rounded to float32."""
    for nfe in range(1, 1001):
        times = torch.tensor(sampler_times(nfe), dtype=torch.float64)
        handed = 1000 * (1 - times)
        assert torch.equal((1 - handed / 1000).float(), times.float()), nfe


def test_an_export_that_draws_other_images_is_refused(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", network_of("dit", ImageSpec(1, 8, 10)))
    monkeypatch.setattr(diffusers, "_uneven_sigmas", lambda middle: {"2": [1.0, 0.25]})
    with pytest.raises(LossyExport, match="other images than the trained network at 2 evaluations"):
        export_student(run, "diffusers", tmp_path / "out", False, "fp32", "mit")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", network_of("dit", ImageSpec(1, 8, 10)))
    monkeypatch.setattr(diffusers.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bowstring\[diffusers\]'"):
        build.export_student(run, "diffusers", tmp_path / "out", False, "fp32", "mit")
