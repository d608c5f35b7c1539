"""A teacher in bf16 is its float32 self to the precision of bf16, for every network."""

import subprocess
import sys
from dataclasses import replace

import public_layouts as public
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.config import ConfigError
from distill.networks.build import build_network
from distill.networks.config import DiTConfig, UNetConfig
from distill.teachers.build import build_teacher
from distill.teachers.config import CheckpointConfig, NativeConfig
from distill.teachers.precision import prepared

IMAGE = public.LATENT


def moved(network, seed=3):
    """The network with every weight away from where it starts, so that its output is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


def drawn(image, batch=6):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, *image.shape, generator=generator)
    return x, torch.linspace(0.05, 0.95, batch), torch.arange(batch) % max(image.num_classes, 1) - 1


def off(found, right):
    return float((found - right).norm() / right.norm())


def velocity(config):
    teacher = build_teacher(config, "cpu")
    return teacher.velocity(*drawn(teacher.image))


@pytest.mark.parametrize("layout", public.LAYOUTS)
def test_every_network_is_near_itself_in_bf16(tmp_path, layout):
    torch.save(public.state_of(layout), tmp_path / "w.pth")
    own = {"num_heads": 4} if layout == "sit" else {}
    own |= {"image_size": 16} if layout.startswith("score-sde") else {}
    config = CheckpointConfig(path=str(tmp_path / "w.pth"), **own)
    right, found = velocity(config), velocity(replace(config, precision="bf16"))
    assert found.dtype == torch.float32
    assert 1e-4 < off(found, right) < 2e-2


@pytest.mark.parametrize(
    "settings",
    [
        DiTConfig(patch_size=2, width=32, depth=2, num_heads=4),
        UNetConfig(width=16, channel_mults=[1, 2]),
    ],
)
def test_bf16_is_a_bare_autocast_loop_with_embeddings_in_float32(settings):
    network, bare = (moved(build_network(settings, IMAGE, seed=1)) for _ in range(2))
    x, t, label = drawn(IMAGE)
    whole = {}
    hooks = [
        part.register_forward_hook(lambda m, _, output, name=name: whole.setdefault(name, output))
        for name, part in bare.named_children()
        if "embed" in name
    ]
    bare(x, t, t, label)
    [hook.remove() for hook in hooks]
    for name, output in whole.items():
        bare.get_submodule(name).register_forward_hook(lambda *_, output=output: output)
    with torch.autocast("cpu", torch.bfloat16):
        right = bare(x, t, t, label).float()
    found = prepared(network, NativeConfig(precision="bf16"))(x, t, t, label)
    assert torch.equal(found, right)


def test_embeddings_and_norms_keep_their_weights_and_products_take_half():
    network = moved(build_network(DiTConfig(width=64, depth=4, num_heads=4), IMAGE, seed=1))
    prepared(network, NativeConfig(precision="bf16"))
    types = {name: weight.dtype for name, weight in network.named_parameters()}
    full = {name.split(".")[0] for name, dtype in types.items() if dtype == torch.float32}
    assert full >= {"t_embedder", "s_embedder", "y_embedder", "x_embedder"}
    assert all(
        types[n] == torch.bfloat16 for n in types if n.startswith("blocks") and "norm" not in n
    )


def test_neighbouring_times_are_told_apart():
    network = moved(build_network(DiTConfig(width=32, depth=1, num_heads=4), IMAGE, seed=1))
    seen = []
    network.t_embedder.register_forward_hook(lambda m, _, output: seen.append(output))
    x, _, label = drawn(IMAGE, 2)
    t = torch.tensor([0.5, 0.5 + 2**-12])  # one number in bfloat16
    prepared(network, NativeConfig(precision="bf16"))(x, t, t, label)
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0][0], seen[0][1])


def flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_round_to_tf32_where_that_is_asked_for_and_nowhere_else(precision):
    network = moved(build_network(DiTConfig(width=32, depth=1, num_heads=4), IMAGE, seed=1))
    seen, before = [], flags()
    network.register_forward_hook(lambda *_: seen.append(flags()))
    x, t, label = drawn(IMAGE)
    prepared(network, NativeConfig(precision=precision))(x, t, t, label)
    assert seen == [(precision == "tf32",) * 2]
    assert flags() == before


COMPILED = """
import functools
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # inductor takes a minute
from distill.config import ImageSpec
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.teachers.config import NativeConfig
from distill.teachers.precision import prepared

def made(is_compiled):
    network = build_network(DiTConfig(width=16, depth=1, num_heads=2), ImageSpec(1, 8, 2), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    config = NativeConfig(precision="bf16", compile=is_compiled)
    return prepared(network.requires_grad_(False), config)

x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([-1, 0, 1])
right, found = (made(is_compiled)(x, t, t, label) for is_compiled in (False, True))
print(float((found - right).norm() / right.norm()))
"""


def test_compiled_in_bf16_gives_the_same_to_the_rounding_of_bf16():
    # In a process of its own: here beartype checks every call, and dynamo cannot follow it.
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 1e-2


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    network = moved(build_network(DiTConfig(width=16, depth=1, num_heads=2), IMAGE, seed=1))
    with pytest.raises(ConfigError, match=r"teacher.NAME.compile=true needs .* no-such-compiler"):
        prepared(network, NativeConfig(compile=True))


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"teacher.precision=fp8 is not known"):
        NativeConfig(precision="fp8")


def test_a_gpu_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with FakeTensorMode(), pytest.raises(ConfigError, match=r"bf16 on cuda.*no bfloat16"):
        prepared(torch.nn.Linear(2, 2, device="cuda"), NativeConfig(precision="bf16"))
