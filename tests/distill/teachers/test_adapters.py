"""Teachers of other code bases: their weights, their conventions, and a sentence for bad files."""

import argparse
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from distill.config import ConfigError, ImageSpec
from distill.networks.build import build_network
from distill.networks.config import DiTConfig, UNetConfig
from distill.networks.files import save_model
from distill.teachers import diffusers
from distill.teachers.base import TeacherDescription, VelocityTeacher
from distill.teachers.build import build_teacher, describe
from distill.teachers.config import DiffusersConfig, EdmConfig, SiTConfig
from distill.teachers.conventions import Converted
from distill.teachers.edm import EdmTeacher
from distill.testing import GaussianFlow

IMAGE = ImageSpec(2, 8, 3)
DIT = DiTConfig(patch_size=2, width=16, depth=2, num_heads=2)
CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_state(config=DIT, image=IMAGE):
    """Weights as after training, without the second-time branch, as SiT's."""
    state = build_network(config, image).state_dict()
    state = {name: v for name, v in state.items() if not name.startswith("s_embedder")}
    moved = {
        name: v + 0.1 * draw(*v.shape, seed=i).float() for i, (name, v) in enumerate(state.items())
    }
    return moved | {"pos_embed": state["pos_embed"]}


def inputs(image=IMAGE):
    return (
        draw(3, *image.shape, seed=9).float(),
        torch.tensor([0.0, 0.4, 1.0]),
        torch.tensor([0, -1, 2]),
    )


def reference_sit(state, x, t, label, heads, patch, null):
    """SiT's forward, written from its parameters alone. Returns all output channels."""

    def linear(h, name):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h, shift, scale):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return h * (1 + scale[:, None]) + shift[:, None]

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    c = linear(
        F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")),
        "t_embedder.mlp.2",
    )
    c = c + state["y_embedder.embedding_table.weight"][torch.where(label < 0, null, label)]
    weight = state["x_embedder.proj.weight"]
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)
    h = patches @ weight.flatten(1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    batch, tokens, width = h.shape
    for block in (name for name in ("blocks.0", "blocks.1")):
        s1, c1, g1, s2, c2, g2 = linear(F.silu(c), f"{block}.adaLN_modulation.1").chunk(6, 1)
        qkv = linear(norm(h, s1, c1), f"{block}.attn.qkv").view(
            batch, tokens, 3, heads, width // heads
        )
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        mixed = ((q @ k.transpose(-1, -2)) / math.sqrt(width // heads)).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        h = h + g1[:, None] * linear(mixed, f"{block}.attn.proj")
        inner = F.gelu(linear(norm(h, s2, c2), f"{block}.mlp.fc1"), approximate="tanh")
        h = h + g2[:, None] * linear(inner, f"{block}.mlp.fc2")
    shift, scale = linear(F.silu(c), "final_layer.adaLN_modulation.1").chunk(2, 1)
    out = linear(norm(h, shift, scale), "final_layer.linear")
    grid = x.shape[-1] // patch
    out = out.view(batch, grid, grid, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(batch, -1, *x.shape[2:])


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "weights.pt", "trainer.pt"])
def test_sit_checkpoint_gives_the_velocity_of_sit(tmp_path, learn_sigma, form):
    state = trained_state(image=replace(IMAGE, channels=4 if learn_sigma else 2))
    if learn_sigma:
        # Twice the output channels, but input channels as before.
        state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][:, :2].contiguous()
    path = tmp_path / f"sit.{form}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "weights.pt":
        torch.save(state, path)
    else:
        other = {name: torch.zeros_like(value) for name, value in state.items()}
        torch.save({"model": other, "ema": state, "args": argparse.Namespace(lr=1e-4)}, path)
    teacher = build_teacher(SiTConfig(path=str(path), num_heads=2), CPU)
    assert teacher.image == IMAGE
    x, t, label = inputs()
    expected = reference_sit(state, x, t, label, heads=2, patch=2, null=3)[:, :2]
    torch.testing.assert_close(teacher.velocity(x, t, label), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().mean() > 0.01


class Malice:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_sit_files_that_cannot_work_get_a_sentence(tmp_path, capsys):
    path = tmp_path / "sit.pt"
    config = SiTConfig(path=str(path), num_heads=2)
    with pytest.raises(ConfigError, match=r"sit.pt is missing"):
        build_teacher(config, CPU)
    torch.save({"ema": Malice()}, path)
    with pytest.raises(ConfigError, match=r"(?s)holds objects of \S*print.*weights_only=False"):
        build_teacher(config, CPU)
    assert "ran" not in capsys.readouterr().out
    torch.save(trained_state(), path)
    with pytest.raises(ConfigError, match=r"width 16.*set teacher.num_heads"):
        build_teacher(replace(config, num_heads=0), CPU)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="cannot be read as plain weights"):
        build_teacher(config, CPU)
    torch.save({"layer.weight": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match="does not hold the weights of a network that is known"):
        build_teacher(config, CPU)


# -----------------------------------------------------------------------------------------------
# EDM, diffusers


def test_edm_velocity_of_the_exact_denoiser_is_the_exact_velocity():
    """For data N(m, c^2 I): D(y, sigma) = (c^2 y + sigma^2 m) / (c^2 + sigma^2)."""
    mean, std, d = draw(1, 2, 2, seed=3), 0.4, 0.5

    def network(x, c_noise, label):
        sigma = (4 * c_noise).exp().reshape(-1, 1, 1, 1)
        norm = (sigma**2 + d**2).sqrt()
        y = x * norm
        denoised = (std**2 * y + sigma**2 * mean) / (std**2 + sigma**2)
        return (denoised - d**2 / norm**2 * y) / (sigma * d / norm)

    teacher = EdmTeacher(network, ImageSpec(1, 2, 0), "", d, sigma_min=1e-4, sigma_max=1e4)
    t = torch.tensor([0.0, 1e-3, 0.3, 0.7, 0.999, 1.0], dtype=torch.float64)
    x, label = draw(6, 1, 2, 2), torch.full((6,), -1)
    expected = GaussianFlow(mean, std).velocity(x, t)
    # At the very ends only c_noise is held back, by one part in 10^4.
    torch.testing.assert_close(teacher.velocity(x, t, label), expected, rtol=1e-3, atol=1e-3)
    inside = slice(1, 5)
    torch.testing.assert_close(
        teacher.velocity(x, t, label)[inside], expected[inside], rtol=1e-9, atol=1e-9
    )


def test_edm_folder(tmp_path):
    image = ImageSpec(1, 8, 0)
    config = UNetConfig(width=8, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[])
    network = build_network(config, image)
    edm = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    save_model(tmp_path / "edm", network.state_dict(), config, image, {"edm": edm})
    teacher = build_teacher(EdmConfig(path=str(tmp_path / "edm")), CPU)
    x = draw(1, 1, 8, 8).float()
    # A network that puts out 0 leaves the linear part: (t d^2 - (1-t)) / n^2 x, here -x and x.
    for t, sign in ((0.0, -1), (1.0, 1)):
        velocity = teacher.velocity(x, torch.tensor([t]), torch.tensor([-1]))
        torch.testing.assert_close(velocity, sign * x)
    save_model(tmp_path / "other", network.state_dict(), config, image, {})
    with pytest.raises(ConfigError, match=r"meta.edm in model.json must hold"):
        build_teacher(EdmConfig(path=str(tmp_path / "other")), CPU)


def test_diffusers_convention_on_the_exact_model():
    """A model that predicts noise - data at time step 1000 sigma, sigma = 1 at noise."""
    mean, std = draw(1, 2, 2, seed=3), 0.4
    flow, seen = GaussianFlow(mean, std), []

    def model(x, step, rows):
        seen.append(rows.tolist())
        sigma = (step / 1000).reshape(-1, 1, 1, 1)
        # x = sigma e + (1 - sigma) data; E[e - data | x] from the joint Gaussian.
        variance = sigma**2 + (1 - sigma) ** 2 * std**2
        prediction = -mean + (sigma - (1 - sigma) * std**2) / variance * (x - (1 - sigma) * mean)
        return torch.cat([prediction, torch.full_like(prediction, torch.nan)], dim=1)

    image = ImageSpec(1, 2, 5)
    velocity = Converted(diffusers.adapted(model, image), diffusers.FLOW)
    teacher = VelocityTeacher(velocity, TeacherDescription(image, ""))
    x, t = draw(3, 1, 2, 2), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    velocity = teacher.velocity(x, t, torch.tensor([0, -1, 4]))
    torch.testing.assert_close(velocity, flow.velocity(x, t), rtol=1e-9, atol=1e-9)
    assert seen == [[0, 5, 4]]


def diffusers_folder(tmp_path, **config):
    content = {"_class_name": "UNet2DModel", "in_channels": 1, "sample_size": 8} | config
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file({"weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    return DiffusersConfig(path=str(tmp_path))


def test_diffusers_absent_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'bowstring\[diffusers\]'"):
        build_teacher(diffusers_folder(tmp_path), CPU)


def test_other_diffusers_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds a FluxTransformer2DModel; teacher\.kind"):
        build_teacher(diffusers_folder(tmp_path, _class_name="FluxTransformer2DModel"), CPU)
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        build_teacher(DiffusersConfig(path=str(tmp_path / "none")), CPU)


@pytest.mark.parametrize("classes", [None, 4])
def test_real_diffusers_unet(tmp_path, classes):
    package = pytest.importorskip("diffusers")
    network = package.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )
    network.save_pretrained(tmp_path, safe_serialization=True)
    teacher = build_teacher(DiffusersConfig(path=str(tmp_path)), CPU)
    assert teacher.image == ImageSpec(1, 8, 3 if classes else 0)
    x, t = draw(2, 1, 8, 8).float(), torch.tensor([0.25, 0.5])
    rows = torch.tensor([0, 3]) if classes else None
    with torch.no_grad():
        expected = -network(x, torch.tensor([750.0, 500.0]), class_labels=rows).sample
    torch.testing.assert_close(teacher.velocity(x, t, torch.tensor([0, -1])), expected)


SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}


def test_what_save_pretrained_writes_opens_in_every_form(tmp_path):
    package = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = package.UNet2DModel(**SMALL)
    network.save_pretrained(tmp_path / "plain")
    network.save_pretrained(tmp_path / "variant", variant="fp16")
    network.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    flow = package.FlowMatchEulerDiscreteScheduler()
    package.DDPMPipeline(unet=network, scheduler=flow).save_pretrained(tmp_path / "pipe")
    network.save_pretrained(tmp_path / "bin", safe_serialization=False)
    x, t, label = draw(2, 1, 8, 8).float(), torch.tensor([0.25, 0.5]), torch.tensor([-1, -1])
    with torch.no_grad():
        right = -network(x, torch.tensor([750.0, 500.0])).sample
    file = "plain/diffusion_pytorch_model.safetensors"
    for form in ("plain", "variant", "parts", "pipe", "pipe/unet", file):
        config = DiffusersConfig(path=str(tmp_path / form))
        found = build_teacher(config, CPU).velocity(x, t, label)
        torch.testing.assert_close(found, right, msg=form)
        assert len(describe(config).fingerprint) == 64
    with pytest.raises(ConfigError, match=r"safetensors is missing; save the model by save_pre"):
        describe(DiffusersConfig(path=str(tmp_path / "bin")))


def test_the_scheduler_beside_a_model_says_what_it_predicts(tmp_path):
    package = pytest.importorskip("diffusers")
    network = package.UNet2DModel(**SMALL)
    for name, scheduler, words in (
        ("ddpm", package.DDPMScheduler(), "path_type=ddpm teacher.prediction=noise"),
        (
            "v",
            package.DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
            "path_type=ddpm teacher.prediction=v",
        ),
        (
            "flow",
            package.DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
            "path_type=linear teacher.prediction=velocity teacher.time=data_to_noise",
        ),
    ):
        pipeline = package.DDPMPipeline(unet=network, scheduler=scheduler)
        pipeline.save_pretrained(tmp_path / name)
        config = DiffusersConfig(path=str(tmp_path / name / "unet"))
        assert words in " ".join(describe(config).notes)
        if name != "flow":  # the noise of its steps is the scheduler's own
            betas = diffusers._convention(tmp_path / name / "unet")[0].betas
            torch.testing.assert_close(torch.tensor(betas), scheduler.betas)
    cosine = package.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    package.DDPMPipeline(unet=network, scheduler=cosine).save_pretrained(tmp_path / "cos")
    betas = diffusers._convention(tmp_path / "cos" / "unet")[0].betas
    torch.testing.assert_close(torch.tensor(betas), cosine.betas)
    path = tmp_path / "cos" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(ConfigError, match=r"EDMEulerScheduler .* not known here"):
        describe(DiffusersConfig(path=str(tmp_path / "cos")))


def test_a_size_that_config_json_does_not_tell_is_a_setting(tmp_path):
    pytest.importorskip("diffusers")
    config = diffusers_folder(tmp_path, sample_size=None)
    with pytest.raises(ConfigError, match=r"set teacher\.image_size"):
        describe(config)
    assert describe(replace(config, image_size=8)).image.size == 8
    assert describe(diffusers_folder(tmp_path, sample_size=[8, 8])).image.size == 8
