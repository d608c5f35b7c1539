"""A description is that of the teacher that would be built, for every kind, and reads no weight."""

import json
import subprocess
import sys
import zipfile
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file

from distill.config import ImageSpec
from distill.networks.build import build_network, empty_network
from distill.networks.config import DiTConfig, EdmUNetConfig
from distill.networks.files import save_model, shapes_of
from distill.teachers.build import build_teacher, describe, start_of
from distill.teachers.config import TEACHERS, NativeConfig, SiTConfig

IMAGE = ImageSpec(2, 8, 3)
DIT = DiTConfig(patch_size=2, width=16, depth=2, num_heads=2)


def native(folder):
    state = build_network(DIT, IMAGE, seed=1).state_dict()
    save_model(folder / "m", state, DIT, IMAGE, {"kind": "student"})
    return {"path": str(folder / "m")}


def analytic(folder):
    content = {"shape": [1, 2, 2], "means": [[0.0] * 4, [1.0] * 4], "stds": [0.1, 0.2]}
    (folder / "mixture.json").write_text(json.dumps(content | {"conditional": True}))
    return {"path": str(folder / "mixture.json")}


def sit(folder):
    torch.save(build_network(DIT, IMAGE, seed=1).state_dict(), folder / "sit.pt")
    return {"path": str(folder / "sit.pt"), "num_heads": 2}


def checkpoint(folder):
    config = EdmUNetConfig(width=8, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[4])
    state = build_network(config, IMAGE, seed=1).state_dict()
    torch.save({"ema": {f"model.{name}": value for name, value in state.items()}}, folder / "e.pt")
    return {"path": str(folder / "e.pt")}


def diffusers(folder):
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    module = pytest.importorskip("diffusers").UNet2DModel(
        **sizes, **blocks, block_out_channels=(8,), norm_num_groups=4, num_class_embeds=4
    )
    module.save_pretrained(folder / "d", safe_serialization=True)
    return {"path": str(folder / "d")}


def edm(folder):
    meta = {"edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}}
    save_model(folder / "e", build_network(DIT, IMAGE).state_dict(), DIT, IMAGE, meta)
    return {"path": str(folder / "e")}


FILES = {
    function.__name__: function for function in (native, analytic, checkpoint, sit, diffusers, edm)
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_description_is_that_of_the_teacher(tmp_path, kind):
    config = TEACHERS[kind](**FILES[kind](tmp_path))
    description, teacher = describe(config), build_teacher(config, "cpu")
    assert description.image == teacher.image
    assert description.fingerprint == teacher.fingerprint
    assert len(description.fingerprint) == 64
    assert description.is_student == getattr(teacher, "is_student", False) == (kind == "native")


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_kind_takes_every_precision(tmp_path, kind):
    config = TEACHERS[kind](**FILES[kind](tmp_path))
    found = {}
    for precision in ("fp32", "auto", "tf32", "bf16"):
        teacher = build_teacher(replace(config, precision=precision), "cpu")
        x = torch.randn(4, *teacher.image.shape, generator=torch.Generator().manual_seed(1))
        label = torch.arange(4) % (teacher.image.num_classes + 1) - 1
        found[precision] = teacher.velocity(x, torch.linspace(0.1, 0.9, 4), label)
    right = found["fp32"]
    assert found["bf16"].dtype == torch.float32
    assert torch.equal(found["auto"], right) and torch.equal(found["tf32"], right)  # on a CPU
    assert (found["bf16"] - right).norm() <= 2e-2 * right.norm()


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_student_starts_from_what_has_the_teachers_velocity(tmp_path, kind):
    config = TEACHERS[kind](**FILES[kind](tmp_path))
    start, teacher = start_of(config), build_teacher(config, "cpu")
    assert (start is not None) == (kind in ("native", "sit", "checkpoint"))
    if start is not None:
        x, t = torch.randn(2, *teacher.image.shape), torch.tensor([0.2, 0.9])
        label = torch.tensor([-1, 1])
        assert torch.equal(start(x, t, t, label), teacher.velocity(x, t, label))


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_kind_is_its_own_class_with_the_settings_of_all(kind):
    config = TEACHERS[kind](path="somewhere")
    assert config.kind == kind
    shared = ("kind", "path", "solver", "steps", "guidance", "weight")
    assert tuple(field.name for field in fields(config))[:6] == shared
    other = next(name for name in TEACHERS if name != kind)
    with pytest.raises(AssertionError, match=f"of kind {other}"):
        replace(config, kind=other)


# -----------------------------------------------------------------------------------------------
# Costs

MEASURE = """
import sys
from pathlib import Path
from distill.teachers.build import describe
from distill.teachers.config import TEACHERS

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

before = resident("VmRSS")
for word in sys.argv[1:]:
    kind, path = word.split("=")
    describe(TEACHERS[kind](path=path))
print(resident("VmHWM") - before, "torch._dynamo" in sys.modules)
"""


def test_no_weight_is_read_and_torch_imports_no_compiler(tmp_path):
    """Peak of the resident set, in which pages of a mapped file count, of a fresh process."""
    config = DiTConfig(patch_size=2, width=1024, depth=1, num_heads=16)
    shapes = shapes_of(empty_network(config, IMAGE).state_dict())
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_model(tmp_path / "m", state, config, IMAGE, {})
    torch.save({"model": state, "ema": state}, tmp_path / "sit.pt")
    save_file(state, tmp_path / "sit.safetensors")
    files = [tmp_path / "m/model.safetensors", tmp_path / "sit.pt", tmp_path / "sit.safetensors"]
    assert min(path.stat().st_size for path in files) > 80e6
    words = [f"native={tmp_path / 'm'}", *(f"sit={path}" for path in files[1:])]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True
    )
    megabytes, has_compiler = done.stdout.split()
    assert float(megabytes) < 40  # of which 16 are of torch's own library
    assert has_compiler == "False"


def test_both_forms_of_a_torch_file_are_read_alike(tmp_path):
    """The older form cannot be mapped, and neither can a zip file that was packed again."""
    state = build_network(DIT, IMAGE, seed=1).state_dict()
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with (
        zipfile.ZipFile(tmp_path / "zip.pt") as source,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    for name in ("zip.pt", "old.pt", "packed.pt"):
        config = SiTConfig(path=str(tmp_path / name), num_heads=2)
        assert describe(config).image == IMAGE
        found = start_of(config).state_dict()
        assert all(torch.equal(found[key], value) for key, value in state.items()), name


def test_a_teacher_keeps_its_weights_when_its_file_is_written_over(tmp_path):
    config = NativeConfig(**native(tmp_path))
    start, path = start_of(config), tmp_path / "m" / "model.safetensors"
    kept = {name: value.clone() for name, value in start.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(value, kept[name]) for name, value in start.state_dict().items())
