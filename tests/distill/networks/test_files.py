"""Model folders: whole or absent, exact, and a sentence for every way to be wrong."""

import json
from dataclasses import replace

import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.networks import files as models
from distill.networks.build import build_network, empty_network
from distill.networks.config import (
    NETWORKS,
    DiTConfig,
    Edm2UNetConfig,
    EdmUNetConfig,
    LightningDiTConfig,
    UNetConfig,
)
from distill.networks.files import (
    WEIGHTS,
    fingerprint,
    load_model,
    load_weights,
    save_model,
    with_weights_of,
)

IMAGE = ImageSpec(1, 8, 3)
DIT = DiTConfig(patch_size=4, width=8, depth=1, num_heads=2)
UNET = UNetConfig(width=8, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[])
LIGHTNING = LightningDiTConfig(patch_size=2, width=16, depth=1, num_heads=2)
EDM = EdmUNetConfig(
    width=8, channel_mults=[1, 2], blocks_per_level=1, embedding="fourier", noise_mult=2
)
EDM2 = Edm2UNetConfig(width=16, channel_mults=[1, 4], blocks_per_level=1)
SMALL = {"dit": DIT, "unet": UNET, "lightningdit": LIGHTNING, "edm_unet": EDM, "edm2_unet": EDM2}
DEEPER = {
    "dit": {"depth": 3},
    "unet": {"blocks_per_level": 3},
    "lightningdit": {"depth": 3},
    "edm_unet": {"blocks_per_level": 3},
    "edm2_unet": {"blocks_per_level": 3},
}


@pytest.mark.parametrize("config", [DIT, UNET], ids=["dit", "unet"])
def test_round_trip_is_exact(tmp_path, config):
    network = build_network(config, IMAGE, seed=3)
    save_model(tmp_path / "m", network.state_dict(), config, IMAGE, {"step": 7})
    loaded, meta = load_model(tmp_path / "m", "cpu")
    assert meta["step"] == 7
    assert ImageSpec(**meta["image"]) == loaded.image == IMAGE
    assert loaded.config == config
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_buffers_may_be_left_out_and_the_fingerprint_is_of_the_weights(tmp_path):
    network = build_network(DIT, IMAGE, seed=3)
    for name in ("a", "b"):
        save_model(tmp_path / name, dict(network.named_parameters()), DIT, IMAGE, {"name": name})
    loaded, _ = load_model(tmp_path / "a", "cpu")
    assert torch.equal(loaded.get_buffer("pos_embed"), network.get_buffer("pos_embed"))
    assert fingerprint(tmp_path / "a" / WEIGHTS) == fingerprint(tmp_path / "b" / WEIGHTS)
    other = build_network(DIT, IMAGE, seed=4)
    save_model(tmp_path / "c", dict(other.named_parameters()), DIT, IMAGE, {})
    assert fingerprint(tmp_path / "a" / WEIGHTS) != fingerprint(tmp_path / "c" / WEIGHTS)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    for seed in (1, 2):
        network = build_network(DIT, IMAGE, seed=seed)
        save_model(tmp_path / "m", network.state_dict(), DIT, IMAGE, {"seed": seed})
    assert load_model(tmp_path / "m", "cpu")[1]["seed"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_shows_nothing_and_keeps_the_old_one(tmp_path, monkeypatch):
    network = build_network(DIT, IMAGE, seed=1)
    save_model(tmp_path / "m", network.state_dict(), DIT, IMAGE, {"seed": 1})

    def full_disk(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "write_json", full_disk)
    for name in ("m", "new"):
        with pytest.raises(OSError, match="No space left"):
            save_model(tmp_path / name, network.state_dict(), DIT, IMAGE, {"seed": 2})
    assert load_model(tmp_path / "m", "cpu")[1]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def spoil_cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_description(folder):
    path = folder / "model.json"
    description = json.loads(path.read_text())
    description["network"]["width"] = 12
    path.write_text(json.dumps(description))


def spoil_kind(folder):
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"dit"', '"mlp"'))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_cut, "model.safetensors cannot be read"),
        (spoil_description, r"blocks.0.adaLN_modulation.1.bias is \[48\], the network has \[72\]"),
        (spoil_kind, "does not describe a network"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.json").unlink(), "model.json is missing"),
        (lambda folder: (folder / "model.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "model.json").write_text("{}"), "is not of the format"),
    ],
)
def test_bad_folders_get_a_sentence(tmp_path, spoil, match):
    network = build_network(DIT, IMAGE)
    save_model(tmp_path / "m", network.state_dict(), DIT, IMAGE, {})
    spoil(tmp_path / "m")
    with pytest.raises(ConfigError, match=match):
        load_model(tmp_path / "m", "cpu")


def test_everything_but_the_second_time_branch_is_required():
    network, state = empty_network(DIT, IMAGE), build_network(DIT, IMAGE).state_dict()
    without_s = {name: v for name, v in state.items() if not name.startswith("s_embedder")}
    load_weights(network, without_s, "file")
    with pytest.raises(ConfigError, match="file lacks 1 tensors of this network, first final"):
        load_weights(
            network, {k: v for k, v in state.items() if k != "final_layer.linear.bias"}, "file"
        )
    with pytest.raises(
        ConfigError, match="file has unknown 1 tensors of this network, first extra"
    ):
        load_weights(network, state | {"extra": torch.zeros(1)}, "file")


# -----------------------------------------------------------------------------------------------
# Networks that are filled, not drawn first


@pytest.mark.parametrize("name", NETWORKS)
def test_an_empty_network_has_no_weights_and_draws_nothing(name):
    before = torch.get_rng_state()
    empty, built = empty_network(SMALL[name], IMAGE), build_network(SMALL[name], IMAGE)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = [{k: v.shape for k, v in module.state_dict().items()} for module in (empty, built)]
    assert shapes[0] == shapes[1]
    for key, value in built.named_buffers():
        assert torch.equal(empty.get_buffer(key), value)


@pytest.mark.parametrize("without", [(), ("buffers",), ("branch",), ("buffers", "branch")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_filled_network_is_the_drawn_one_with_the_file_copied_in(name, dtype, without):
    config = SMALL[name]
    other = build_network(config, IMAGE, seed=5)
    dropped = {key for key, _ in other.named_buffers()} if "buffers" in without else set()
    if "branch" in without:
        dropped |= {key for key in other.state_dict() if key.startswith("s_embedder.")}
    state = {k: v.to(dtype) for k, v in other.state_dict().items() if k not in dropped}
    expected = build_network(config, IMAGE)
    expected.load_state_dict(state, strict=False)
    found = load_weights(empty_network(config, IMAGE), state, "file")
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
        assert found.state_dict()[key].dtype == value.dtype
    assert not any(tensor.is_meta for tensor in [*found.parameters(), *found.buffers()])
    assert all(parameter.requires_grad for parameter in found.parameters())
    x, t = torch.randn(2, *IMAGE.shape), torch.tensor([0.1, 0.6])
    u = [network(x, t, t + 0.3, torch.tensor([0, -1])) for network in (found, expected)]
    assert torch.equal(*u)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shallowest_network_starts_with_the_same_embedders(name):
    deep = replace(SMALL[name], **DEEPER[name])
    found, expected = (build_network(c, IMAGE).s_embedder for c in (deep.shallowest(), deep))
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)


def test_a_student_takes_the_weights_of_its_start():
    start = build_network(DIT, IMAGE, seed=3).eval().requires_grad_(False)
    network = with_weights_of(start, DIT, IMAGE)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    for key, value in start.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    assert with_weights_of(start, replace(DIT, depth=2), IMAGE) is None
    # Which no shape shows: the same weights in four heads are another function.
    assert with_weights_of(start, replace(DIT, num_heads=4), IMAGE) is None
    assert with_weights_of(start, UNET, IMAGE) is None
