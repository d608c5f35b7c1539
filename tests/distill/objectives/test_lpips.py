"""LPIPS: the package's own number, zero on the diagonal, gradient to the images alone."""

from collections.abc import Callable

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

from distill.config import ConfigError
from distill.objectives.base import Call
from distill.objectives.distances import Distances, rms_huber
from distill.objectives.lpips import load_lpips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone() -> dict[str, torch.Tensor]:
    """The features of a vgg16 with random weights, in torchvision's names."""
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        f"features.{name}": (2 / max(value[0].numel(), 1)) ** 0.5
        * torch.randn(value.shape, generator=generator)
        * (1.0 if value.ndim > 1 else 0.1)
        for name, value in shapes.items()
    }


@pytest.fixture(scope="module")
def path(backbone, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(backbone | {"classifier.0.weight": torch.zeros(3)}, file)
    return str(file)


@pytest.fixture(scope="module")
def distance(path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return load_lpips(path, CPU)


def images(size: int = 32, channels: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, channels, size, size, generator=generator) - 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [32, 256])
def test_it_is_the_package_with_small_images_enlarged(distance, backbone, size):
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # with the package's heads
    state = reference.net.state_dict()
    reference.net.load_state_dict({k: backbone[f"features.{k.split('.', 1)[1]}"] for k in state})
    a, b = images(size), images(size, seed=2)
    found = distance(a, b)
    if size < 256:
        a, b = (F.interpolate(x, size=224, mode="bilinear") for x in (a, b))
    expected = reference(a, b).flatten()
    assert found.shape == (2,) and bool((found > 0.01).all())
    torch.testing.assert_close(found, expected)


def test_an_image_is_at_distance_zero_from_itself_alone(distance):
    a, b = images(), images(seed=2)
    assert torch.equal(distance(a, a), torch.zeros(2))
    torch.testing.assert_close(distance(a, b), distance(b, a))


def test_gradient_reaches_the_images_and_no_weight(distance):
    a, b = images().requires_grad_(), images(seed=2)
    distance(a, b).sum().backward()
    assert bool((a.grad.flatten(1).norm(dim=1) > 0).all())
    assert not any(p.requires_grad or p.grad is not None for p in distance._network.parameters())
    h = 1e-2 * a.grad / a.grad.norm()
    with torch.no_grad():  # along the gradient it rises as the gradient says
        rise = (distance(a + h, b) - distance(a - h, b)).sum() / 2e-2
    assert float(rise) == pytest.approx(float(a.grad.norm()), rel=0.05)


def test_loading_draws_no_random_number(path):
    before = torch.random.get_rng_state()
    load_lpips(path, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_safetensors_are_read_too(backbone, distance, tmp_path):
    save_file(backbone, tmp_path / "vgg16.safetensors")
    again = load_lpips(str(tmp_path / "vgg16.safetensors"), CPU)
    a, b = images(), images(seed=2)
    assert torch.equal(again(a, b), distance(a, b))


def test_grey_images_are_refused(distance):
    with pytest.raises(ConfigError, match=r"lpips compares RGB images, and these have 1 channels"):
        distance(images(channels=1), images(channels=1))


def without_last(state):
    return {name: value for name, value in state.items() if name != "features.28.bias"}


def misshapen(state):
    return state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            without_last,
            r"lacks 1 of the 26 tensors of a vgg16.s features, first features\.28\.bias",
        ),
        (misshapen, r"features\.0\.weight is \[64, 1, 3, 3\], vgg16 has \[64, 3, 3, 3\]"),
        (lambda state: torch.zeros(3), "holds no state dict"),
        (lambda state: {"path": CPU, "code": ConfigError}, "cannot be read, or holds more than"),
    ],
    ids=["missing", "shape", "tensor", "code"],
)
def test_a_file_of_another_network_is_refused(backbone, tmp_path, change, match):
    torch.save(change(backbone), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=match):
        load_lpips(str(tmp_path / "other.pth"), CPU)


@pytest.mark.parametrize("name", ["vgg16.pth", "vgg16.safetensors"])
def test_a_file_that_is_cut_or_missing_is_refused(path, tmp_path, name):
    with pytest.raises(ConfigError, match=r"objective\.lpips_backbone='.*' is not there"):
        load_lpips(str(tmp_path / name), CPU)
    with open(path, "rb") as file:
        (tmp_path / name).write_bytes(file.read(1000))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_lpips(str(tmp_path / name), CPU)


def test_a_jump_to_an_image_and_one_between_pull_in_one_scale(distance):
    """Their gradients along the error are alike, whatever the number of pixels: pseudo-Huber alone
    grows with its root, and outweighed LPIPS by that."""
    zero, one = torch.zeros(2), torch.tensor([1.0, 0.9])
    jump = Call(images(32), zero, one)
    change = images(32, seed=2) - jump.x
    error = 0.3 * torch.randn(change.shape, generator=torch.Generator().manual_seed(3))
    u = (change + error).requires_grad_()
    off = Distances(distance, rms_huber).jumps(jump, u, change, power=0.3)
    (pull,) = torch.autograd.grad(off.sum(), u)
    along = (pull * error).flatten(1).sum(dim=1) / error.flatten(1).square().mean(dim=1).sqrt()
    assert bool((along > 0).all())
    assert 0.1 < float(along[0] / along[1]) < 10
