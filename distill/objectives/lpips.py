"""LPIPS, a distance of images by the features of a VGG16. Only importer of lpips.

    d(a, b) = sum_l mean_hw sum_c w_lc (f_l(a) - f_l(b))^2     (Zhang et al., 2018, eq. 1)

f_l are the features of layer l, scaled to unit length over the channels; w_l the heads, which come
with the package. The VGG16 itself is a file of the user's: nothing is ever downloaded.
"""

import warnings
from pathlib import Path
from pickle import UnpicklingError

import lpips
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import ConfigError, check

KEY = "objective.lpips_backbone"
HEADS = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
# Smaller images are shown to the VGG at the size it was trained on, as consistency models do (Song
# et al., 2023; `consistency_losses` of openai/consistency_models, cm/karras_diffusion.py).
LARGE, VGG_SIZE = 256, 224


class Lpips:
    """LPIPS with a frozen network. Gradient reaches both images and no weight."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval().requires_grad_(False)

    def __call__(
        self, a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B"]:
        """d(a, b) of RGB images in [-1, 1], float32.

        Raises:
            ConfigError: the images have not three channels.
        """
        check(
            a.shape[1] == 3,
            f"objective.distance=lpips compares RGB images, and these have {a.shape[1]} channels; "
            "choose l2 or pseudo_huber",
        )
        return self._network(_shown(a), _shown(b)).flatten()


def _shown(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
    """`x` in float32 and at the size that the VGG looks at."""
    x = x.float()
    return x if x.shape[-1] >= LARGE else F.interpolate(x, size=VGG_SIZE, mode="bilinear")


def load_lpips(path: str, device: torch.device) -> Lpips:
    """LPIPS on `device`, from a state dict of torchvision's vgg16: safetensors, or torch.save's.

    The classifier's tensors may be left out.

    Raises:
        ConfigError: the file is missing, cut, or not of a vgg16.
    """
    with warnings.catch_warnings(), torch.device("meta"):  # no weights are made, nor drawn
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision in an old way
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    given = _read(path)
    # net.slice2.5.weight is torchvision's features.5.weight.
    names = {key: f"features.{key.split('.', 1)[1]}" for key in network.net.state_dict()}
    _check_backbone(
        given, {names[key]: v.shape for key, v in network.net.state_dict().items()}, path
    )
    backbone = {key: given[name].float() for key, name in names.items()}
    network.net.load_state_dict(backbone, assign=True)
    heads = torch.load(HEADS, map_location="cpu", weights_only=True)
    network.load_state_dict(heads, strict=False, assign=True)
    assert not any(value.is_meta for value in network.state_dict().values())
    return Lpips(network.to(device))


def _read(path: str) -> dict[str, Tensor]:
    """The tensors of the user's file."""
    check(
        Path(path).is_file(),
        f"{KEY}={path!r} is not there; objective.distance=lpips needs the weights of torchvision's "
        "vgg16 (vgg16-397923af.pth, or its tensors as .safetensors)",
    )
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{KEY}={path} cannot be read, or holds more than tensors") from error
    check(isinstance(content, dict), f"{KEY}={path} holds no state dict")
    return content


def _check_backbone(given: dict[str, Tensor], shapes: dict[str, torch.Size], path: str) -> None:
    """Raises ConfigError unless `given` has every tensor of `shapes`, in its shape."""
    missing = [name for name in shapes if name not in given]
    if missing:
        raise ConfigError(
            f"{KEY}={path} lacks {len(missing)} of the {len(shapes)} tensors of a vgg16's "
            f"features, first {missing[0]}"
        )
    for name, shape in shapes.items():
        check(
            given[name].shape == shape,
            f"{KEY}={path}: {name} is {list(given[name].shape)}, vgg16 has {list(shape)}",
        )
