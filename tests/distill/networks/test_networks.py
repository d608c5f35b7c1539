"""Both networks: SiT's names, the inert second-time branch, derivatives, and how weights load."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.networks import config as settings
from distill.networks.build import build_network, empty_network
from distill.networks.config import (
    DiTConfig,
    EdmUNetConfig,
    LightningDiTConfig,
    UNetConfig,
    network_config,
)
from distill.networks.dit import grid_embedding
from distill.networks.files import load_weights
from distill.networks.layers import AbstractNetwork
from distill.testing import NETWORKS

IMAGE = ImageSpec(channels=2, size=8, num_classes=3)
DIT = DiTConfig(patch_size=2, width=16, depth=2, num_heads=2)
DIT_64_TOKENS = DiTConfig(patch_size=1, width=16, depth=1, num_heads=2)
UNET = UNetConfig(
    width=16, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[8], num_heads=2
)
# Every network that exists: a new one is here by its row in `distill.testing`.
EDM = EdmUNetConfig(width=8, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[4])
NCSNPP = replace(
    EDM,
    channel_mults=[1, 1, 2],
    embedding="fourier",
    noise_mult=2,
    encoder="residual",
    decoder="skip",
    filter=[1.0, 3.0, 3.0, 1.0],
    time="flow",
)
EVERY = {
    **NETWORKS,
    "dit": DIT,
    "dit64": DIT_64_TOKENS,
    "unet": UNET,
    "lightningdit": LightningDiTConfig(width=32, depth=1, num_heads=2, qk_norm=True),
    "ncsnpp": NCSNPP,
    "ncsnpp-skip": replace(NCSNPP, encoder="skip", embedding="positional"),
    "adm": replace(EDM, family="adm", width=64),
}
CONFIGS = pytest.mark.parametrize("config", EVERY.values(), ids=list(EVERY))


def stirred(config, image=IMAGE, scale=0.1, s_branch=True) -> AbstractNetwork:
    """A float64 network whose every weight was moved, as after training."""
    network = build_network(config, image).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if s_branch or not name.startswith("s_embedder"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += scale * noise
    return network


def inputs(image=IMAGE, batch=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, *image.shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)[:batch]
    s = torch.tensor([1.0, 0.9, 0.7], dtype=torch.float64)[:batch]
    return x, t, s, torch.tensor([0, -1, 2])[:batch]


def test_no_network_is_left_out_here():
    assert NETWORKS.keys() == settings.NETWORKS.keys()
    assert all(settings.NETWORKS[config.name] is type(config) for config in EVERY.values())


@CONFIGS
def test_a_network_is_described_by_plain_values(config):
    """As model.json and run.json hold them."""
    assert network_config(json.loads(json.dumps(asdict(config)))) == config


@CONFIGS
def test_student_from_teacher_has_exactly_its_velocity(config):
    teacher, student = stirred(config, s_branch=False), empty_network(config, IMAGE).double()
    state = {k: v for k, v in teacher.state_dict().items() if not k.startswith("s_embedder")}
    load_weights(student, state, "teacher")
    x, t, s, label = inputs()
    assert torch.equal(student(x, t, t, label), teacher(x, t, t, label))
    # The branch is inert at the start, so the student's jump is one Euler step of the teacher.
    assert torch.equal(student(x, t, s, label), teacher(x, t, t, label))
    assert teacher(x, t, t, label).abs().min() > 1e-6


@CONFIGS
def test_second_time_branch_vanishes_on_the_diagonal_for_every_weight(config):
    network, (x, t, s, label) = stirred(config), inputs()
    without = stirred(config)
    for parameter in without.s_embedder.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(network(x, t, t, label), without(x, t, t, label))
    assert (network(x, t, s, label) - without(x, t, s, label))[:2].abs().max() > 1e-4
    # So training on s = t, a teacher's, leaves it alone.
    network(x, t, t, label).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad == 0).all() == name.startswith("s_embedder"), name


@CONFIGS
def test_jvp_in_t_and_s_equals_central_differences(config):
    network, (x, t, s, label) = stirred(config), inputs()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    one = torch.ones_like(t)

    def at(x, t, s):
        return network(x, t, s, label)

    h = 1e-7  # the time of score_sde turns by 999 t
    for tangent in [(direction, one, 0 * one), (0 * x, 0 * one, one)]:
        _, derivative = torch.func.jvp(at, (x, t, s), tangent)
        ahead, behind = (
            at(*(a + sign * h * b for a, b in zip((x, t, s), tangent, strict=True)))
            for sign in (1, -1)
        )
        assert derivative.abs().max() > 1e-3
        torch.testing.assert_close(derivative, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-7)


@CONFIGS
def test_a_batch_is_its_samples(config):
    network, (x, t, s, label) = stirred(config), inputs()
    whole = network(x, t, s, label)
    for i in range(len(x)):
        row = slice(i, i + 1)
        torch.testing.assert_close(whole[row], network(x[row], t[row], s[row], label[row]))


@CONFIGS
def test_unconditional_images_have_one_row_for_none(config):
    image = ImageSpec(2, 8, 0)
    network, (x, t, s, _) = stirred(config, image), inputs()
    if config.name not in ("edm_unet", "edm2_unet"):  # whose layer just lacks a column
        assert network.y_embedder.embedding_table.weight.shape[0] == 1
    assert network(x, t, s, torch.full((3,), -1)).shape == x.shape


@CONFIGS
def test_weights_depend_on_the_seed_alone(config):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_network(config, IMAGE, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = (build_network(config, IMAGE, seed=s).state_dict() for s in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_dit_has_the_names_and_shapes_of_sit():
    width, tokens = 16, 16
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, 2, 2, 2),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (4, width),
        "final_layer.linear.weight": (2 * 2 * 2, width),
        "final_layer.linear.bias": (2 * 2 * 2,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    layers = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "adaLN_modulation.1": 6}
    for block in range(2):
        for name, factor in layers.items():
            shapes[f"blocks.{block}.{name}.weight"] = (factor * width, width)
            shapes[f"blocks.{block}.{name}.bias"] = (factor * width,)
        shapes[f"blocks.{block}.mlp.fc2.weight"] = (width, 4 * width)
        shapes[f"blocks.{block}.mlp.fc2.bias"] = (width,)
    state = build_network(DIT, IMAGE).state_dict()
    found = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("s_embedder")}
    assert found == shapes


def test_grid_embedding_is_column_then_row():
    table = grid_embedding(8, 3)[0]
    # Token 5 is row 1, column 2; two frequencies, 1 and 1/100.
    angles = torch.tensor([2.0, 0.02, 1.0, 0.01])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(table[5], expected)


@pytest.mark.parametrize("size", [32, 64])
def test_unet_takes_both_image_sizes(size):
    config = UNetConfig(width=8, channel_mults=[1, 1, 2], blocks_per_level=1, num_heads=2)
    network = build_network(config, ImageSpec(3, size, 0))
    x = torch.zeros(1, 3, size, size)
    assert network(x, torch.zeros(1), torch.ones(1), torch.tensor([-1])).shape == x.shape


def test_every_convolution_of_the_unet_gets_channels_last():
    """A layer that lays its output out anew would have cuDNN copy it back at every convolution."""
    network, seen = build_network(UNET, IMAGE, seed=0), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            module.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    t = torch.rand(2)
    u = network(torch.randn(2, *IMAGE.shape), t, t, torch.zeros(2, dtype=torch.long))
    assert len(seen) > 10 and u.is_contiguous()
    for given, made in seen:
        assert given.is_contiguous(memory_format=torch.channels_last)
        assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (DiTConfig(patch_size=3, width=16, num_heads=2), "patch_size=3 must divide"),
        (DiTConfig(width=18, num_heads=2), "width=18 must be a multiple of 4"),
        (UNetConfig(channel_mults=[1] * 5), "multiple of 16, not 8"),
        (EdmUNetConfig(channel_mults=[1] * 5), "multiple of 16, not 8"),
        (LightningDiTConfig(width=24, num_heads=4), "heads of 6; rotary positions need a multiple"),
    ],
)
def test_impossible_sizes_are_refused(config, match):
    with pytest.raises(ConfigError, match=match):
        build_network(config, IMAGE)


def test_bfloat16_network_keeps_the_dtype_of_its_input():
    network = build_network(DIT, IMAGE).to(torch.bfloat16)
    x, t, s, label = inputs()
    assert network(x.float(), t.float(), s.float(), label).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_keep_their_bits_in_a_network_of_16_bits(dtype):
    network = build_network(NCSNPP, IMAGE)
    before = network.map_noise.get_buffer("freqs").clone()
    assert torch.equal(network.to(dtype).map_noise.get_buffer("freqs"), before)
    assert network.map_layer0.weight.dtype == dtype
