"""The networks of public training code, recognised by the names and shapes of their weights.

What a file says of itself is believed, what it does not is a setting, and what was taken for want
of either is said in `Layout.notes`. `convert` gives the weights by our names: in our convention of
time too, where that can be done to the weights themselves.

    a layout                        its names
    DiT, SiT, REPA, and their kin   x_embedder, blocks.N.mlp.fc1, final_layer; projectors (REPA)
    LightningDiT                    the same with blocks.N.mlp.w12
    NCSN++, DDPM++ (score_sde)      all_modules.N
    EDM, rfpp                       map_layer0, enc.32x32_conv, dec.8x8_in0
    EDM2                            emb_noise, enc.32x32_conv, dec.8x8_in0
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.config import ConfigError, ImageSpec, check
from distill.networks import edm_unet
from distill.networks.build import empty_network
from distill.networks.config import (
    DiTConfig,
    Edm2UNetConfig,
    EdmUNetConfig,
    LightningDiTConfig,
    NetworkConfig,
)
from distill.teachers.config import CheckpointConfig
from distill.teachers.conventions import Convention
from distill.teachers.weights import Weights

State = dict[str, Tensor]

FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")
TABLE = "y_embedder.embedding_table.weight"
# Heads of the published sizes S, B, L, XL by width; the weights do not tell.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# What REPA's trainer is asked for, and no other.
REPA_SETTINGS = {"proj_coeff", "enc_type", "encoder_depth"}
PATHS = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}
PREDICTED = {
    **dict.fromkeys(("velocity", "v", "flow"), "velocity"),
    **dict.fromkeys(("noise", "eps", "epsilon"), "noise"),
    **dict.fromkeys(("data", "x", "x0", "x_start", "sample"), "data"),
    "score": "score",
}


@dataclass(frozen=True)
class Layout:
    """What a file of weights is of.

    Attributes:
        name: in words.
        network, image: that `convert`ed weights fit.
        convention: that the network was trained in.
        is_turned: whether `convert` brings the weights into our convention.
        has_none: whether it knows the label "none".
        notes: what the user should hear.
    """

    name: str
    network: NetworkConfig
    image: ImageSpec
    convert: Callable[[State], State]
    convention: Convention = field(default_factory=Convention)
    is_turned: bool = False
    has_none: bool = True
    notes: tuple[str, ...] = ()


def layout_of(weights: Weights, config: CheckpointConfig) -> Layout:
    """The layout of `weights`.

    Raises:
        ConfigError: of no network that is known here, or a size that nothing tells.
    """
    names = weights.tensors.keys()
    try:
        if "blocks.0.mlp.w12.weight" in names or "blocks.0.mlp.fc1.weight" in names:
            return _transformer(weights, config)
        if "all_modules.0.weight" in names or "all_modules.0.W" in names:
            return _score_sde(weights, config)
        if "map_layer0.weight" in names and any(name.startswith("enc.") for name in names):
            return _edm(weights, config)
        if "emb_noise.weight" in names and "out_gain" in names:
            return _edm2(weights, config)
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{config.path} lacks weights of its network ({error})") from error
    raise ConfigError(
        f"{config.path} does not hold the weights of a network that is known here (DiT, SiT, REPA, "
        f"LightningDiT, NCSN++ and DDPM++ of score_sde, EDM, EDM2); its first names are: "
        f"{', '.join(list(names)[:3])}"
    )


# -----------------------------------------------------------------------------------------------
# Transformers


def _transformer(weights: Weights, config: CheckpointConfig) -> Layout:
    shapes = {name: value.shape for name, value in weights.tensors.items()}
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    grid = math.isqrt(shapes["pos_embed"][1])
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    heads, notes = _heads(weights, config, width)
    num_classes, has_none = _classes(weights, config)
    sizes: dict[str, Any] = {"patch_size": patch_size, "width": width, "depth": depth}
    sizes["num_heads"] = heads
    network: DiTConfig
    if is_lightning := "blocks.0.mlp.w12.weight" in shapes:
        hidden = shapes["blocks.0.mlp.w3.weight"][1]
        qk_norm = "blocks.0.attn.q_norm.weight" in shapes
        network = LightningDiTConfig(**sizes, mlp_ratio=_ratio_of(hidden, width), qk_norm=qk_norm)
    else:
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
        network = DiTConfig(**sizes, mlp_ratio=hidden / width)
    image = ImageSpec(channels, grid * patch_size, num_classes)
    found = _transformer_convention(weights, config)
    reversed_ = found.is_ours and (config.time or found.time) == "data_to_noise"
    folds = reversed_ and not (config.path_type or config.prediction)

    def convert(state: State) -> State:
        state = {n: v for n, v in state.items() if not n.startswith("projectors.")}
        for name in FINAL:
            if len(state[name]) == 2 * channels * patch_size**2:
                state[name] = _first_half(state[name], channels)
        table = state.get(TABLE)
        if table is None or len(table) == num_classes:
            none = state["x_embedder.proj.bias"].new_zeros(1, width)
            state[TABLE] = none if table is None else torch.cat([table, none])
        return _turned(state) if folds else state

    name = "LightningDiT" if is_lightning else "DiT or SiT"
    return Layout(name, network, image, convert, found, folds, has_none, notes)


def _ratio_of(hidden: int, width: int) -> float:
    """A ratio that `swiglu_width` makes `hidden` of."""
    for full in range(hidden * 3 // 2, hidden * 3 // 2 + 3):
        if int(2 / 3 * full) == hidden and int(width * (full / width)) == full:
            return full / width
    raise ValueError(f"no mlp_ratio gives {hidden} of {width}")


def _heads(weights: Weights, config: CheckpointConfig, width: int) -> tuple[int, tuple[str, ...]]:
    """Heads of a transformer, and what to say of where they are known from."""
    shapes = {name: value.shape for name, value in weights.tensors.items()}
    if config.num_heads:
        return config.num_heads, ()
    for name in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if name in shapes:
            return width // shapes[name][-1], ()
    said = weights.settings.get("num_heads")
    if isinstance(said, int) and said > 0:
        return said, ()
    heads = HEADS.get(width, 0)
    if heads == 0:
        raise ConfigError(
            f"{config.path} has width {width}, no published size: set teacher.num_heads"
        )
    note = f"{heads} heads, as in the published networks of width {width} (teacher.num_heads)"
    return heads, (note,)


def _classes(weights: Weights, config: CheckpointConfig) -> tuple[int, bool]:
    """Classes, and whether the label table has a row for "none" after theirs."""
    if TABLE not in weights.tensors:
        return 0, True
    rows = len(weights.tensors[TABLE])
    said = weights.settings.get("num_classes")
    if config.num_classes:
        check(
            config.num_classes in (rows, rows - 1),
            f"teacher.num_classes={config.num_classes}, but the label table of {config.path} has "
            f"{rows} rows; that is {rows - 1} classes and "
            f'"none", or {rows} classes',
        )
        said = config.num_classes
    num_classes = said if said in (rows, rows - 1) else rows - 1
    assert isinstance(num_classes, int)
    return num_classes, num_classes < rows


def _transformer_convention(weights: Weights, config: CheckpointConfig) -> Convention:
    """What a transformer's file says of how it was trained."""
    said = weights.settings
    name = config.path.replace("\\", "/").rsplit("/", 1)[-1]
    is_repa = bool(said.keys() & REPA_SETTINGS) or any(
        name.startswith("projectors.") for name in weights.tensors
    )
    model = str(said.get("model", "")) or name
    if model.startswith("DiT-") and not is_repa and "path_type" not in said:
        return Convention("ddpm", "noise", "data_to_noise")
    words = {key: str(said.get(key, default)).lower() for key, default in _SAID.items()}
    path_type, prediction = PATHS.get(words["path_type"]), PREDICTED.get(words["prediction"])
    if not config.path_type and path_type is None:
        raise ConfigError(
            f"{config.path} says path_type={words['path_type']}, which is not known here; set "
            "teacher.path_type"
        )
    if not config.prediction and prediction is None:
        raise ConfigError(
            f"{config.path} says prediction={words['prediction']}, which is not known here; set "
            "teacher.prediction"
        )
    time = "data_to_noise" if is_repa else "noise_to_data"
    return Convention(path_type or "linear", prediction or "velocity", time)


_SAID = {"path_type": "linear", "prediction": "velocity"}


def _first_half(value: Tensor, channels: int) -> Tensor:
    """The rows of `value`, a tensor of the last layer, that make the first `channels` channels."""
    return value.unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1)  # (row and column, channel)


def _turned(state: State) -> State:
    """The weights of the same transformer with time and output turned round: -v(x, 1 - t).

    The first layer takes cos and sin of w t, and cos w(1-t) = cos w cos wt + sin w sin wt,
    sin w(1-t) = sin w cos wt - cos w sin wt. So its columns are mixed by a rotation, up to
    rounding; the signs of the last layer are exact.
    """
    name = "t_embedder.mlp.0.weight"
    weight = state[name].double()
    half = weight.shape[1] // 2
    angles = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float64) / half)
    of_cos, of_sin = weight.split(half, dim=1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    return state | {name: turned} | {final: -state[final] for final in FINAL}


# -----------------------------------------------------------------------------------------------
# U-Nets


def _edm(weights: Weights, config: CheckpointConfig) -> Layout:
    shapes = {name: value.shape for name, value in weights.tensors.items()}
    is_song = "out_norm.weight" not in shapes
    sizes, blocks_per_level = _levels(shapes)
    size = sizes[0]
    features, condition = shapes["map_layer0.weight"][::-1]
    width = shapes[f"enc.{size}x{size}_conv.weight"][0] if is_song else features
    blocks = {size: f"enc.{size}x{size}_block0.conv0.weight" for size in sizes}
    mults = [shapes[blocks[size]][0] // width for size in sizes]
    encoder = next(
        (way for way in ("residual", "skip") if _has(shapes, f"_aux_{way}.")), "standard"
    )
    tails = [name for name in shapes if name.endswith("_aux_conv.weight")]
    num_classes = shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0
    network = EdmUNetConfig(
        family="song" if is_song else "adm",
        width=width,
        channel_mults=mults,
        blocks_per_level=blocks_per_level,
        attention_sizes=[
            size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in shapes
        ],
        embedding="fourier" if "map_noise.freqs" in shapes else "positional",
        noise_mult=features // width,
        condition_mult=condition // width,
        encoder=encoder,
        decoder="skip" if len(tails) > 1 else "standard",
        filter=_filter(weights, encoder),
        sigma_data=float(weights.settings.get("sigma_data", 0.5)),
    )
    channels = shapes[f"enc.{size}x{size}_conv.weight"][1]
    has_none = num_classes == 0 or float(weights.settings.get("label_dropout", 0)) > 0

    def convert(state: State) -> State:
        return {
            name: value
            for name, value in state.items()
            if not name.endswith("resample_filter") and not name.startswith("map_augment.")
        }

    name = "U-Net of EDM"
    image = ImageSpec(channels, size, num_classes)
    return Layout(name, network, image, convert, has_none=has_none)


def _levels(shapes: dict[str, torch.Size]) -> tuple[list[int], int]:
    """Sizes of an encoder of EDM, the largest first, and blocks at each."""
    at = re.compile(r"enc\.(\d+)x\d+_(\w+?)(\d*)\.")
    parts = [match.groups() for name in shapes if (match := at.match(name))]
    sizes = sorted({int(size) for size, _, _ in parts}, reverse=True)
    return sizes, 1 + max(int(index) for _, what, index in parts if what == "block")


def _edm2(weights: Weights, config: CheckpointConfig) -> Layout:
    shapes = {name: value.shape for name, value in weights.tensors.items()}
    sizes, blocks_per_level = _levels(shapes)
    size = sizes[0]
    width, channels = shapes[f"enc.{size}x{size}_conv.weight"][:2]
    wide = [shapes[f"enc.{size}x{size}_block0.conv_res1.weight"][0] for size in sizes]
    network = Edm2UNetConfig(
        width=width,
        channel_mults=[outputs // width for outputs in wide],
        blocks_per_level=blocks_per_level,
        attention_sizes=[s for s in sizes if f"enc.{s}x{s}_block0.attn_qkv.weight" in shapes],
        sigma_data=float(weights.settings.get("sigma_data", 0.5)),
    )
    num_classes = shapes["emb_label.weight"][1] if "emb_label.weight" in shapes else 0
    image = ImageSpec(channels - 1, size, num_classes)  # beside one of ones

    def convert(state: State) -> State:
        return {name: value if value.ndim else value[None] for name, value in state.items()}

    return Layout("U-Net of EDM2", network, image, convert, has_none=num_classes == 0)


def _has(shapes: dict[str, torch.Size], part: str) -> bool:
    return any(part in name for name in shapes)


def _filter(weights: Weights, encoder: str) -> list[float]:
    """The filter of both resamplings: a buffer of every layer that does one."""
    for name, value in weights.tensors.items():
        if name.endswith("resample_filter"):
            row = value[0, 0, 0].double()
            return [round(weight, 6) for weight in (row / row[0]).tolist()]
    return [1.0, 3.0, 3.0, 1.0] if encoder != "standard" else [1.0, 1.0]


# Their names in a block of score_sde, and in one of EDM.
OF_BLOCK = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}
# A convolution that stands in a module of its own, beside the blocks.
CONVOLUTIONS = ({"Conv_0.weight", "Conv_0.bias"}, {"Conv2d_0.weight", "Conv2d_0.bias"})


def _score_sde(weights: Weights, config: CheckpointConfig) -> Layout:
    """score_sde's NCSN++ and DDPM++ (BigGAN blocks, rescaled skips), the same networks as EDM's."""
    modules = _modules(weights.tensors)
    is_fourier = "W" in modules[0]
    first = 1 if is_fourier else 0
    features, condition = modules[first]["weight"].shape[::-1]
    stem = modules[first + 2]["weight"]
    width, channels = stem.shape[:2]
    body = modules[first + 3 :]
    at = [index for index, part in enumerate(body) if "Dense_0.weight" in part]
    resampling = [index for index in at if _resamples(body[index])]
    levels = len(resampling) // 2 + 1
    per_level = (len(at) - len(resampling) - 2 - levels) // (2 * levels)
    check(per_level > 0, f"{config.path} has no blocks of score_sde's NCSN++ at every level")
    size = config.image_size or int(weights.settings.get("image_size", 0))
    check(
        size > 0,
        f"{config.path} is a network of score_sde, whose weights do not tell the size of its "
        "images: set teacher.image_size",
    )
    # Of every level the first block, which no other than its own attention follows.
    starts = [at[0], *(at[at.index(down) + 1] for down in resampling[: levels - 1])]
    attends = ["NIN_0.W" in body[start + 1] for start in starts]
    extra = [part for part in body if part.keys() in CONVOLUTIONS]
    encoder = "standard"
    if extra:
        encoder = "skip" if next(iter(extra[0].values())).shape[-1] == 1 else "residual"
    tails = sum(part.keys() == {"weight", "bias"} and part["weight"].ndim == 4 for part in body)
    network = EdmUNetConfig(
        width=width,
        channel_mults=[body[i]["Conv_0.weight"].shape[0] // width for i in starts],
        blocks_per_level=per_level,
        attention_sizes=[size >> level for level in range(levels) if attends[level]],
        embedding="fourier" if is_fourier else "positional",
        noise_mult=features // width,
        condition_mult=condition // width,
        encoder=encoder,
        decoder="skip" if tails > 1 else "standard",
        filter=[1.0, 1.0] if encoder == "standard" and tails == 1 else [1.0, 3.0, 3.0, 1.0],
        time="flow",
    )
    image = ImageSpec(channels, size, 0)
    notes = (f"resampling by the filter {network.filter}, as in the published networks",)

    def convert(state: State) -> State:
        return _by_names_of_edm(_modules(state), network, image)

    return Layout("NCSN++ or DDPM++ of score_sde", network, image, convert, notes=notes)


def _modules(state: State) -> list[State]:
    """The tensors of every numbered module, in order."""
    found: dict[int, State] = {}
    for name, value in state.items():
        if name.startswith("all_modules."):
            _, index, rest = name.split(".", 2)
            found.setdefault(int(index), {})[rest] = value
    return [found[index] for index in sorted(found)]


def _resamples(block: State) -> bool:
    """Whether a block halves or doubles: only there has it a skip layer between equal channels."""
    outputs, inputs = block["Conv_0.weight"].shape[:2]
    return inputs == outputs and "Conv_2.weight" in block


def _by_names_of_edm(modules: list[State], config: EdmUNetConfig, image: ImageSpec) -> State:
    """score_sde's numbered modules by EDM's names: both go through their layers in one order."""
    network = empty_network(config, image)
    assert isinstance(network, edm_unet.EdmUNet)
    rest = iter(modules)
    state: State = {}
    if config.embedding == "fourier":
        state["map_noise.freqs"] = next(rest)["W"]
    for name in ("map_layer0", "map_layer1"):
        state |= {f"{name}.{key}": value for key, value in next(rest).items()}
    for side, parts in (("enc", network.enc), ("dec", network.dec)):
        for name, module in parts.items():
            at = f"{side}.{name}"
            if isinstance(module, edm_unet.Resample):
                continue
            if not isinstance(module, edm_unet.Block):
                of_one = next(rest)
                state |= {f"{at}.{key.split('.')[-1]}": value for key, value in of_one.items()}
                continue
            for key, value in next(rest).items():
                layer, kind = key.split(".")
                state[f"{at}.{OF_BLOCK[layer]}.{kind}"] = value
            if module.num_heads:
                state |= {f"{at}.{key}": v for key, v in _attention_of(next(rest)).items()}
    return state


def _attention_of(part: State) -> State:
    """Attention of score_sde, q, k and v apart, as EDM's with its order (feature, q k v)."""
    weights = [part[f"NIN_{i}.W"].T[:, :, None, None] for i in range(4)]
    biases = [part[f"NIN_{i}.b"] for i in range(3)]
    return {
        "norm2.weight": part["GroupNorm_0.weight"],
        "norm2.bias": part["GroupNorm_0.bias"],
        "qkv.weight": torch.stack(weights[:3], dim=1).flatten(0, 1),
        "qkv.bias": torch.stack(biases, dim=1).flatten(),
        "proj.weight": weights[3],
        "proj.bias": part["NIN_3.b"],
    }
