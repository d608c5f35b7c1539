"""The weights in a file that somebody else's training wrote, found by what it holds.

A file is a plain state dictionary, or a tree with several of them: of the model, of averages, with
optimizer and arguments beside them. Names carry what they were wrapped in. Nothing is unpickled but
tensors, plain values and a few harmless types (`_safe`).

    weights = open_weights(path)
    weights.tensors["blocks.0.attn.qkv.weight"]
"""

import argparse
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.config import ConfigError, check
from distill.networks import files

# Names that sets of weights go by, of averages first; earlier ones win.
AVERAGES = ("ema", "ema_state_dict", "model_ema", "ema_model", "state_dict_ema", "net_ema")
PLAIN = ("", "model", "state_dict", "model_state_dict", "net", "network", "module", "params")
# What a set of names may stand below when a larger module held the network.
HOLDERS = {*AVERAGES, *PLAIN, "online_model", "_forward_module", "diffusion_model", "unet"}
# What is trained beside a network and has no part in its output: EDM2's estimate of its own error.
BESIDE = re.compile(r"^logvar_")
# What wrappers put into names, wherever they wrap.
WRAPPERS = re.compile(
    r"(^|\.)((_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
IS_AVERAGE = re.compile(r"(^|[_.])ema|ema($|[_.\d])|average|shadow|(^|[_.])swa($|[_.])")
NO_WEIGHTS = re.compile(r"^(opt|optim|sched|lr_|scaler|grad_scaler|rng|callbacks|loops|loss)")
SETTINGS = ("args", "config", "cfg", "hparams", "hyper_parameters", "model_args", "model_config")

NOT_PLAIN = (
    "{path} holds objects of {types}, and nothing but tensors and plain values is read, since a "
    "pickle is a program. Where you trust the file, write its weights alone:\n"
    "  python -c \"import torch; c = torch.load({path!r}, map_location='cpu', weights_only=False)"
    "; torch.save({{k: v for k, v in c.items() if k in ('ema', 'model', 'state_dict')}}, "
    "'weights.pt')\"\nand give weights.pt as the teacher's path"
)


@dataclass(frozen=True)
class Weights:
    """A set of weights.

    Attributes:
        tensors: by the network's own names, without what wrapped it; mapped, not read yet.
        chosen: where in the file they are, such as "ema"; "" for all of it.
        others: the sets beside it.
        settings: arguments and settings stored beside them, by their last name.
    """

    tensors: dict[str, Tensor]
    chosen: str
    others: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def words(self) -> str:
        """Which weights were taken; "" where there was no choice."""
        if not self.others:
            return ""
        return f"weights {self.chosen!r} taken, beside them: {', '.join(map(repr, self.others))}"


def open_weights(path: Path, wanted: str = "") -> Weights:
    """The weights in a .pt, .pth, .bin or .safetensors file, or in a folder with one or its parts.

    Of several sets the average is taken, or the one named `wanted`.

    Raises:
        ConfigError: missing, cut, more than weights, none, or several with nothing to choose by.
    """
    content: Any = {}
    for file in weight_files(path):
        part = files.read_tensors(file) if file.suffix == ".safetensors" else _read_torch(file)
        content = {**content, **part} if isinstance(part, Mapping) and content else part
    found = dict(_sets(content))
    check(len(found) > 0, f"{path} holds no weights: no tensors with names of parameters")
    chosen = _choose(path, list(found), wanted)
    tensors = found[chosen]
    if isinstance(tensors, list):
        tensors = _named(path, chosen, tensors, found)
    others = tuple(name for name in found if name != chosen)
    return Weights(_with_dots(tensors, found), chosen, others, _settings(content))


def weight_files(path: Path) -> list[Path]:
    """The file itself, or those of a folder: all that an index names, or the only one there is.

    Raises:
        ConfigError: there is none, or several without an index.
    """
    if not path.is_dir():
        check(path.exists(), f"{path} is missing")
        return [path]
    if indices := sorted(path.glob("*.index.json")):
        try:
            names = set(json.loads(indices[0].read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{indices[0]} is no index of weights ({error!r})") from error
        return [path / name for name in sorted(names)]
    for kind in ("*.safetensors", "*.pt", "*.pth", "*.bin"):
        there = sorted(path.glob(kind))
        check(
            len(there) < 2,
            f"{path} holds {len(there)} files of weights ({', '.join(f.name for f in there[:4])}); "
            "name one of them",
        )
        if there:
            return there
    raise ConfigError(f"{path} is a folder without weights (.safetensors, .pt, .pth or .bin)")


def fingerprint(path: Path) -> str:
    """sha256, in hex, of the file of weights, or of the hashes of its parts.

    Raises:
        ConfigError: as `weight_files`.
    """
    prints = [files.fingerprint(file) for file in weight_files(path)]
    return prints[0] if len(prints) == 1 else sha256("".join(prints).encode()).hexdigest()


# -----------------------------------------------------------------------------------------------
# Reading


def _safe() -> list[Any]:
    """Types that stand beside weights and hold nothing that could run."""
    numpy_types = [np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    scalar = np.float64(0).__reduce__()[0]
    paths = [
        (pure, f"pathlib.{module}{kind}Path")
        for kind, pure in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath))
        for module in ("", "_local.")
    ]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, *numpy_types, *paths, *scalars]


def _read_torch(path: Path) -> Any:
    """What a torch file holds, opened without running any code in it."""
    try:
        # Mapped, so that only what is used is read: of a trainer's file one part in four.
        mapped = zipfile.is_zipfile(path) and _is_stored(path)
        with torch.serialization.safe_globals(_safe()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        types = _refused(path, str(error))
        if types:
            raise ConfigError(NOT_PLAIN.format(path=str(path), types=types)) from error
        raise ConfigError(
            f"{path} cannot be read as plain weights; it is cut, or no file of torch "
            f"({str(error).splitlines()[0]})"
        ) from error


def _refused(path: Path, message: str) -> str:
    """The types in a file that are no plain values, in words; "" where that is not its fault."""
    if zipfile.is_zipfile(path):
        try:
            with torch.serialization.safe_globals(_safe()):
                return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
            return ""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return found.group(1) if found else ""


def _is_stored(path: Path) -> bool:
    """Whether no member of a zip file is compressed, as torch writes it."""
    with zipfile.ZipFile(path) as file:
        return all(member.compress_type == zipfile.ZIP_STORED for member in file.infolist())


# -----------------------------------------------------------------------------------------------
# Finding


def _sets(content: Any, key: str = "") -> Iterator[tuple[str, dict[str, Tensor] | list[Tensor]]]:
    """Every set of weights in a tree, by its place; a list is one whose names are elsewhere."""
    if isinstance(content, list | tuple):
        nameless = [item for item in content if isinstance(item, Tensor)]
        if len(content) == len(nameless) > 2 and all(t.is_floating_point() for t in nameless):
            yield key, nameless
        return
    if not isinstance(content, Mapping):
        return
    tensors = {
        WRAPPERS.sub(r"\1", name): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if any("." in name for name in tensors):
        yield from _split(tensors, key)
    for name, part in content.items():
        if isinstance(name, str) and not NO_WEIGHTS.match(name) and not isinstance(part, Tensor):
            yield from _sets(part, f"{key}.{name}" if key else name)


def _split(tensors: dict[str, Tensor], key: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The sets that stand side by side in one dictionary, apart, and without their holders."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        # Counters of averages have no dot, and no axes. EDM2's gains have none either.
        is_counter = "." not in name and value.ndim == 0 and not name.endswith("gain")
        if is_counter or BESIDE.match(name):
            continue
        first, dot, rest = name.partition(".")
        holder = first if dot and first in HOLDERS else ""
        parts.setdefault(holder, {})[rest if holder else name] = value
    for holder, part in parts.items():
        says_more = holder and (len(parts) > 1 or IS_AVERAGE.search(holder))
        place = f"{key}.{holder}".strip(".") if says_more else key
        if holder:
            yield from _split(part, place)
        elif any("." in name for name in part) or len(parts) == 1:
            yield place, part


def _choose(path: Path, places: list[str], wanted: str) -> str:
    """The place of the weights to take."""
    listed = ", ".join(repr(place) for place in places)
    if wanted:
        meant = [place for place in places if f"{place}.".startswith(f"{wanted}.")]
        check(
            len(meant) == 1,
            f"teacher.weights={wanted}: {path} has no such weights; it has: {listed}",
        )
        return meant[0]
    ranks = {place: _rank(place) for place in places}
    best = [place for place in places if ranks[place] == min(ranks.values())]
    check(
        len(best) == 1,
        f"{path} holds several sets of weights: {listed}; choose one by teacher.weights=NAME",
    )
    return best[0]


def _rank(place: str) -> tuple[int, int]:
    """Averages before plain weights before others, each in the order of their names."""
    words = place.split(".")
    for order, name in enumerate(AVERAGES):
        if name in words:
            return 0, order
    if IS_AVERAGE.search(place):
        return 1, 0
    for order, name in enumerate(PLAIN):
        if name in words:
            return 2, order
    return 3, 0


def _named(
    path: Path, chosen: str, values: list[Tensor], found: dict[str, Any]
) -> dict[str, Tensor]:
    """A list of averages by the names of the model beside it, in the order of its parameters.

    The list has neither buffers nor fixed parameters: these are the model's.
    """
    for model in found.values():
        if isinstance(model, list):
            continue
        names = list(model)
        forward = _aligned(names, model, values)
        backward = _aligned(names[::-1], model, values[::-1])[::-1]
        # The same from both ends: no fixed tensor has the shape of a parameter next to it.
        if forward == backward and len(forward) == len(values):
            return model | dict(zip(forward, values, strict=True))
    raise ConfigError(
        f"{path}: the weights {chosen!r} are a list without names, and no other set in the file "
        "has parameters of these shapes in this order; choose another set by teacher.weights=NAME"
    )


def _aligned(names: list[str], model: dict[str, Tensor], values: list[Tensor]) -> list[str]:
    """For each of the values in turn the next name whose tensor has its shape, while one has."""
    found = list[str]()
    for name in names:
        if len(found) < len(values) and model[name].shape == values[len(found)].shape:
            found.append(name)
    return found


def _with_dots(tensors: dict[str, Tensor], found: dict[str, Any]) -> dict[str, Tensor]:
    """`tensors`, by the names of another set in the file where their own lost the dots."""
    if any("." in name for name in tensors):
        return tensors
    for model in found.values():
        if isinstance(model, dict):
            dotted = {name.replace(".", ""): name for name in model if "." in name}
            if dotted.keys() & tensors.keys():
                return {dotted.get(name, name): value for name, value in tensors.items()}
    return tensors


def _settings(content: Any) -> dict[str, Any]:
    """Plain settings stored beside the weights, by their last name; outer ones win."""
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, Any] = {}

    def take(tree: Any) -> None:
        tree = vars(tree) if isinstance(tree, argparse.Namespace) else tree
        if isinstance(tree, Mapping):
            for name, value in tree.items():
                if isinstance(value, str | int | float | bool):
                    found.setdefault(str(name), value)
            for value in tree.values():
                take(value)

    for name in SETTINGS:
        take(content.get(name))
    return found
