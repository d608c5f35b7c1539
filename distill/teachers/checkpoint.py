"""Teachers from files that public training code wrote: opened, recognised, and converted.

`weights` finds the tensors, `layouts` says of which network and in which convention, and
`conventions` makes our velocity of what it predicts.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distill.flow.paths import MeanVelocity
from distill.networks.build import empty_network
from distill.networks.files import check_weights, load_weights, shapes_of
from distill.networks.layers import AbstractNetwork
from distill.teachers import weights as weight_files
from distill.teachers.base import NetworkTeacher, TeacherDescription, VelocityTeacher, check_none
from distill.teachers.config import CheckpointConfig
from distill.teachers.conventions import Convention, Converted, Model, convention_of
from distill.teachers.layouts import Layout, layout_of
from distill.teachers.precision import prepared


@dataclass(frozen=True)
class Opened:
    """A file of weights, recognised. Nothing of the weights is read."""

    tensors: dict[str, Tensor]
    layout: Layout
    convention: Convention
    description: TeacherDescription


def open_checkpoint(config: CheckpointConfig) -> Opened:
    """What a file of weights holds.

    Raises:
        ConfigError: missing, cut, of no network that is known, or a size that nothing tells.
    """
    path = Path(config.path)
    weights = weight_files.open_weights(path, config.weights)
    layout = layout_of(weights, config)
    check_none(config, layout.has_none)
    said = convention_of(config, layout.convention)
    convention = Convention() if layout.is_turned else said
    # Shapes as a load will have them: one value stands for all of a tensor. The meta device would
    # have torch import its compiler: seconds, and 180 MB.
    hollow = {name: v.new_zeros(()).expand(v.shape) for name, v in weights.tensors.items()}
    shapes = shapes_of(layout.convert(hollow))
    check_weights(empty_network(layout.network, layout.image), shapes, path)
    notes = (weights.words, *layout.notes, convention.words if convention.is_foreign else "")
    description = TeacherDescription(
        layout.image,
        weight_files.fingerprint(path),
        has_none=layout.has_none,
        network=None if convention.is_foreign else layout.network,
        notes=tuple(f"{layout.name}: {note}" for note in notes if note),
    )
    return Opened(weights.tensors, layout, convention, description)


def load_network(opened: Opened, source: str, device: torch.device | str) -> AbstractNetwork:
    """The frozen network of a file, on `device`, in the convention of the file."""
    layout = opened.layout
    network = empty_network(layout.network, layout.image)
    state = layout.convert(dict(opened.tensors))
    return load_weights(network, state, source, device).eval().requires_grad_(False)


def load_raw(config: CheckpointConfig, device: torch.device | str) -> Model:
    """The network as the file has it, whatever it predicts. Raises as `open_checkpoint`."""
    plain = replace(config, path_type="linear", prediction="velocity", time="noise_to_data")
    return _predictor(prepared(load_network(open_checkpoint(plain), config.path, device), config))


def _predictor(network: MeanVelocity) -> Model:
    def predict(y: Tensor, tau: Tensor, label: Tensor) -> Tensor:
        return network(y, tau, tau, label)

    return predict


def load_checkpoint(
    config: CheckpointConfig, device: torch.device | str
) -> NetworkTeacher | VelocityTeacher:
    """The teacher in a file of weights. Raises as `open_checkpoint`."""
    opened = open_checkpoint(config)
    network = load_network(opened, config.path, device)
    if not opened.convention.is_foreign:
        return NetworkTeacher(prepared(network, config), opened.description)
    velocity = Converted(_predictor(prepared(network, config)), opened.convention)
    return VelocityTeacher(velocity, opened.description)
