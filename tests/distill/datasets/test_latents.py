"""Latents: encoded once, resumed by the shard, read as they were written, decoded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from rich.progress import Progress

from distill.config import ConfigError
from distill.datasets import decode, encode, images, latents
from distill.datasets.config import DataConfig
from distill.evaluation.config import EvalConfig
from distill.evaluation.evaluate import Evaluator
from distill.evaluation.metrics import Drawn, measure
from distill.networks.autoencoder import _taesd_decoder, _taesd_encoder, load_autoencoder

NUM = 230
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path):
    np.savez(tmp_path / "set.npz", images=PIXELS, labels=np.arange(NUM) % 3)
    path = str(tmp_path / "set.npz")
    return DataConfig(name="npz", path=path, channels=3, size=16, num_classes=3, workers=0)


def kl(folder, seed=0, **settings):
    torch.manual_seed(seed)
    net = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **settings,
    )  # fmt: skip
    net.save_pretrained(folder)
    return net.eval()


def run_encode(data, coder, out, flips=False):
    said = []
    return encode.encode(data, str(coder), out, flips, said.append), said


def of(data, out, **settings):
    found = {"name": "latents", "path": str(out), "channels": 4, "size": 8, "num_classes": 3}
    return DataConfig(**(found | settings))


@torch.no_grad()
def test_scale_shift_and_channel_statistics_are_those_of_the_files(tmp_path):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    for index, settings in enumerate(
        (
            {"scaling_factor": 0.18215},
            {"scaling_factor": 0.36, "shift_factor": 0.1},
            {"scaling_factor": 1.0, "latents_mean": [0.1, 0, 0, 1], "latents_std": [2, 1, 1, 4]},
        )
    ):
        net = kl(tmp_path / str(index) / "vae", **settings)
        coder = load_autoencoder(str(tmp_path / str(index)))  # a pipeline's folder
        shift = torch.tensor(settings.get("latents_mean", [settings.get("shift_factor", 0.0)] * 4))
        std = torch.tensor(settings.get("latents_std", [1.0] * 4))
        posterior = net.encode(x).latent_dist
        scale = (settings["scaling_factor"] / std)[:, None, None]
        mean, deviation = coder.encode(x)
        assert torch.allclose(mean, (posterior.mean - shift[:, None, None]) * scale, atol=1e-6)
        assert torch.allclose(deviation, posterior.std * scale, atol=1e-6)
        assert torch.allclose(coder.decode(mean), net.decode(posterior.mean).sample, atol=1e-5)


@torch.no_grad()
def test_taesd_as_published_equals_diffusers_where_that_has_it(tmp_path):
    """diffusers knows the family without the groups in the middle; its names have a prefix."""
    net = AutoencoderTiny(latent_channels=4).eval()
    state = net.state_dict()
    for part in ("encoder", "decoder"):
        prefix = f"{part}.layers."
        own = {
            str(int(k.removeprefix(prefix).split(".")[0]) + (part == "decoder"))
            + "." + ".".join(k.removeprefix(prefix).split(".")[1:]): v
            for k, v in state.items() if k.startswith(prefix)
        }  # fmt: skip
        torch.save(own, tmp_path / f"tiny_{part}.pth")
    coder = load_autoencoder(str(tmp_path))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = coder.encode(x)
    assert std is None and torch.allclose(mean, net.encode(x).latents, atol=1e-5)
    assert torch.allclose(coder.decode(mean), net.decode(mean).sample, atol=1e-4)


def test_taesd_with_groups_in_the_middle_loads_and_changes_the_picture(tmp_path):
    torch.save(_taesd_encoder(32, True).state_dict(), tmp_path / "taef2_encoder.pth")
    torch.save(_taesd_decoder(32, True).state_dict(), tmp_path / "taef2_decoder.pth")
    coder = load_autoencoder(str(tmp_path))
    mean, _ = coder.encode(torch.zeros(1, 3, 16, 16))
    assert mean.shape == (1, 32, 2, 2) and coder.decode(mean).shape == (1, 3, 16, 16)
    for name, match in (("encoder", "TAESD family"),):
        torch.save({"0.weight": torch.zeros(2)}, tmp_path / f"taef2_{name}.pth")
        with pytest.raises(ConfigError, match=match):
            load_autoencoder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"must hold one autoencoder.*0 such pairs"):
        load_autoencoder(str(tmp_path / "nowhere"))


def test_latents_are_read_as_they_were_encoded_mirrored_and_drawn(source, tmp_path):
    kl(tmp_path / "kl", scaling_factor=0.5)
    about, _ = run_encode(source, tmp_path / "kl", tmp_path / "out", flips=True)
    coder, data = load_autoencoder(str(tmp_path / "kl")), of(source, tmp_path / "out", flips=True)
    found = images.open_images(data)
    pixels = images.open_images(source).read(np.arange(NUM))
    mean, std = coder.encode(images.in_range(torch.from_numpy(pixels)))
    some = np.array([0, 99, 100, 229])
    assert np.allclose(found.read(some), mean[some], atol=2e-3)
    assert found.labels.tolist() == [index % 3 for index in range(NUM)]
    mirrored, _ = coder.encode(images.in_range(torch.from_numpy(pixels[..., ::-1].copy())))
    drawn = np.stack(
        [found.draw(some, np.ones(4, bool), 0, np.arange(4 * i, 4 * i + 4)) for i in range(400)]
    )
    assert np.abs(drawn.mean(axis=0) - mirrored[some].numpy()).max() < 0.3 * float(std.max())
    assert drawn.std(axis=0).mean() == pytest.approx(float(std[some].mean()), rel=0.03)
    again = found.draw(some, np.ones(4, bool), 0, np.arange(4))
    assert (again == drawn[0]).all()
    assert np.allclose(about.mean, mean.mean((0, 2, 3)), atol=1e-3)
    assert np.allclose(about.std, mean.std((0, 2, 3)), rtol=1e-2)
    batch = images.ImageStream(found, 0, 8, 0, 1, 0.0, True, workers=1).read(2)
    assert batch.states.shape == (8, 1, 2, 4, 8, 8)


def test_a_killed_encoding_goes_on_and_damage_is_seen(source, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PER_SHARD", 100)
    monkeypatch.setattr(encode, "PARTS", 1)
    kl(tmp_path / "kl")
    whole, _ = run_encode(source, tmp_path / "kl", tmp_path / "a")
    run_encode(source, tmp_path / "kl", tmp_path / "b")
    (tmp_path / "b" / "latents.json").unlink()
    (tmp_path / "b" / "latents_00001.safetensors").unlink()
    again, said = run_encode(source, tmp_path / "kl", tmp_path / "b")
    assert said == [f"{tmp_path / 'b'}: 200 of 230 images"]
    assert again == whole
    shard = tmp_path / "b" / "latents_00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"latents_00002\.safetensors is missing or not what"):
        images.check_files(of(source, tmp_path / "b"))
    kl(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"another autoencoder or other settings.*--out"):
        run_encode(source, tmp_path / "other", tmp_path / "a")


def test_settings_that_do_not_describe_the_latents(source, tmp_path):
    kl(tmp_path / "kl"), kl(tmp_path / "other", seed=1)
    run_encode(source, tmp_path / "kl", tmp_path / "out")
    for change, match in (
        ({"size": 16}, r"holds latents \[4, 8, 8\] of AutoencoderKL"),
        ({"num_classes": 10}, "must be 0 or 3"),
        ({"flips": True}, "encode with --flips"),
        ({"path": str(tmp_path)}, "`bowstring encode` makes it"),
    ):
        with pytest.raises(ConfigError, match=match):
            images.open_images(of(source, tmp_path / "out", **change))
    data = of(source, tmp_path / "out")
    assert decode.reference(data) == source
    show = decode.to_pictures(data, "cpu")
    assert show(torch.zeros(2, 4, 8, 8)).dtype == torch.uint8
    other = replace(data, autoencoder=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="is not the one that encoded"):
        decode.to_pictures(other, "cpu")
    assert decode.to_pictures(replace(data, path=""), "cpu") is None


def test_an_evaluation_compares_decoded_samples_with_the_images_that_were_encoded(source, tmp_path):
    coder = kl(tmp_path / "kl")
    run_encode(source, tmp_path / "kl", tmp_path / "out")
    data, settings = of(source, tmp_path / "out"), EvalConfig(num_samples=4)
    evaluator = Evaluator(data, settings, torch.device("cpu"), Progress(disable=True))
    assert (evaluator.real.n, evaluator.real.name) == (NUM, "npz")
    x = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = decode.to_uint8(coder.decode(x / coder.config.scaling_factor).sample)
    drawn = Drawn(x, x, torch.zeros_like(x), evaluator.features, evaluator.to_pictures)
    found = measure(drawn)
    assert found["frechet"] == evaluator.features.compare(pixels)["frechet"]
    without = Evaluator(
        replace(data, path=""), settings, torch.device("cpu"), Progress(disable=True)
    )
    assert without.features is None and without.to_pictures is None
