"""Files in the layouts of public training code, with weights drawn by name.

`python tests/public_layouts.py` writes the reference outputs that lie in
tests/fixtures/public_outputs.safetensors. They were made by networks of this package when these
agreed, within 5e-6 of the mean magnitude, with outputs of the public code itself on files of
every layout here.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from distill.config import ImageSpec
from distill.networks.build import build_network
from distill.networks.config import DiTConfig, Edm2UNetConfig, EdmUNetConfig, LightningDiTConfig

OUTPUTS = Path(__file__).parent / "fixtures" / "public_outputs.safetensors"
LATENT, RGB, PLAIN = ImageSpec(4, 8, 10), ImageSpec(3, 16, 10), ImageSpec(3, 16, 0)
FIR = [1.0, 3.0, 3.0, 1.0]
UNET = {"width": 8, "channel_mults": [1, 2], "blocks_per_level": 1, "attention_sizes": [8]}
SONG = EdmUNetConfig(**UNET)
NCSNPP = EdmUNetConfig(
    **UNET, embedding="fourier", noise_mult=2, encoder="residual", decoder="skip", filter=FIR
)
# Network, image, and the time that its layers are asked for, by layout.
LAYOUTS = {
    "sit": (DiTConfig(patch_size=2, width=32, depth=2, num_heads=4), LATENT),
    "lightningdit": (LightningDiTConfig(width=32, depth=2, num_heads=4, mlp_ratio=4.0), LATENT),
    "edm-ddpmpp": (SONG, RGB),
    "edm-ncsnpp": (NCSNPP, PLAIN),
    "edm-adm": (EdmUNetConfig(**UNET | {"width": 64}, family="adm", condition_mult=2), RGB),
    "edm2": (
        Edm2UNetConfig(width=32, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[8]),
        RGB,
    ),
    "score-sde": (EdmUNetConfig(**UNET, time="flow"), PLAIN),
    "score-sde-fir": (
        EdmUNetConfig(
            **UNET | {"channel_mults": [1, 1, 2]},
            encoder="skip",
            decoder="skip",
            filter=FIR,
            time="flow",
        ),
        PLAIN,
    ),
}
OF_SCORE_SDE = {
    "norm0": "GroupNorm_0",
    "conv0": "Conv_0",
    "affine": "Dense_0",
    "norm1": "GroupNorm_1",
    "conv1": "Conv_1",
    "skip": "Conv_2",
}


def drawn(name, shape, salt=""):
    """A tensor that depends on its name and shape alone, of the size that layers start with."""
    seed = int.from_bytes(hashlib.sha256((name + salt).encode()).digest()[:6], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fan = max(1, values[0].numel() if values.ndim > 1 else 4)
    return values / fan**0.5 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def state_of(layout, salt=""):
    """The weights of a layout by its names, a reference state dictionary."""
    config, image = LAYOUTS[layout]
    network = build_network(config, image)
    fixed = dict(network.named_buffers())
    state = {
        name: fixed[name] if name in fixed else drawn(name, value.shape, salt)
        for name, value in network.state_dict().items()
        if not name.startswith("s_embedder")
    }
    if layout.startswith("score-sde"):
        return _numbered(state, config.embedding == "fourier")
    if layout == "edm2":
        beside = {"logvar_fourier.freqs": torch.ones(4), "logvar_linear.weight": torch.ones(1, 4)}
        return {
            f"unet.{name}": value[0] if name.endswith("_gain") else value
            for name, value in state.items()
        } | beside
    if layout.startswith("edm"):
        return _with_buffers(network, state)
    return state


def _with_buffers(network, state):
    """EDM's filters are buffers of their layers, and its augmentation has one."""
    found = dict(state)
    for name, module in network.named_modules():
        if name.endswith((".conv0.resample", ".skip.resample", "_aux_residual.resample")):
            found[name.replace(".resample", ".resample_filter")] = module.table
        elif name.endswith(".skip") and "table" in dict(module.named_buffers()):
            found[f"{name}.resample_filter"] = module.table
    if "out_norm.weight" not in found:
        found["map_augment.weight"] = drawn("map_augment", (network.features, 9))
    return {f"model.{name}": value for name, value in found.items()}


def _numbered(state, is_fourier):
    """EDM's names as score_sde's numbers. q, k and v come apart."""
    modules, last = [], None
    for name, value in state.items():
        if name == "map_noise.freqs":
            continue
        at, _, kind = name.rpartition(".")
        side, _, rest = at.partition(".")
        block, _, layer = rest.partition(".")
        place = (side, block, layer in ("norm2", "qkv", "proj")) if layer else (at,)
        if place != last:
            modules.append({})
            last = place
        if layer == "qkv":
            for index, part in enumerate(value.unflatten(0, (-1, 3)).unbind(1)):
                key = f"NIN_{index}.{'W' if kind == 'weight' else 'b'}"
                modules[-1][key] = part[:, :, 0, 0].T if kind == "weight" else part
        elif layer == "proj":
            key, part = ("NIN_3.W", value[:, :, 0, 0].T) if kind == "weight" else ("NIN_3.b", value)
            modules[-1][key] = part
        elif layer == "norm2":
            modules[-1][f"GroupNorm_0.{kind}"] = value
        elif layer:
            modules[-1][f"{OF_SCORE_SDE[layer]}.{kind}"] = value
        elif block.endswith("_aux_skip"):
            modules[-1][f"Conv_0.{kind}"] = value
        elif block.endswith("_aux_residual"):
            modules[-1][f"Conv2d_0.{kind}"] = value
        else:
            modules[-1][kind] = value
    first = [{"W": state["map_noise.freqs"]}] if is_fourier else []
    numbered = {"sigmas": torch.linspace(1, 0, 10, dtype=torch.float64)}
    for index, part in enumerate([*first, *modules]):
        numbered |= {f"all_modules.{index}.{key}": value for key, value in part.items()}
    return numbered


def inputs(image):
    """x, t and labels, one of them "none" where the network has classes."""
    draw = torch.Generator().manual_seed(3)
    t = torch.tensor([0.1, 0.35, 0.6, 0.9])
    label = torch.tensor([0, 3, 9, -1]) if image.num_classes else torch.full((4,), -1)
    return torch.randn(4, *image.shape, generator=draw), t, label


def expected(layout):
    """The velocity at `inputs` of the weights of a layout."""
    return load_file(OUTPUTS)[layout]


def _write():
    """Our own network, asked directly: it has no part in how a file is opened."""
    found = {}
    for layout, (config, image) in LAYOUTS.items():
        network = build_network(config, image)
        state = network.state_dict()
        fixed = dict(network.named_buffers())
        for name in state:
            if name not in fixed and not name.startswith("s_embedder"):
                state[name] = drawn(name, state[name].shape)
        network.load_state_dict(state)
        x, t, label = inputs(image)
        with torch.no_grad():
            found[layout] = network(x, t, t, label).contiguous()
    save_file(found, OUTPUTS)


if __name__ == "__main__":
    _write()
