"""Export: one jump G(x, t, s, label) = x + (s - t) u as a graph, for a runtime without Python.

    jump.onnx or jump.pt2   x [B, C, H, W], t [B], s [B] float32, label [B] int64 -> x_s; any B
    graph.json              inputs, the times of few-step sampling, and where the model comes from

Sampling is a loop outside: x <- jump(x, t_n, t_n+1, label), from noise at 0 to the image at 1.
"""

import contextlib
import io
import logging
import warnings
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.config import LossyExport, check
from distill.export.card import Use, write_card
from distill.export.student import TrainedStudent
from distill.flow import noise, paths, times
from distill.networks.layers import AbstractNetwork
from distill.run.files import RunDir, replaced, write_json

INPUTS, OUTPUT = ("x", "t", "s", "label"), "x_s"
ONNX, PROGRAM, DESCRIPTION = "jump.onnx", "jump.pt2", "graph.json"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TRACED, TRIED = 3, (1, 5)  # batch sizes
TOLERANCE = 1e-4  # of the largest value; a runtime adds up in another order
ONE_FILE_BYTES = 1_500_000_000  # protobuf takes 2 GiB

HOW_ONNX = """import json, numpy as np, onnxruntime
jump = onnxruntime.InferenceSession("jump.onnx")
x, label = np.random.randn(4, {shape}).astype("f4"), np.array({labels})
times = json.load(open("graph.json"))["times"]["2"]
for t, s in zip(times[:-1], times[1:]):
    t, s = np.full(4, t, "f4"), np.full(4, s, "f4")
    x, = jump.run(None, {{"x": x, "t": t, "s": s, "label": label}})"""

HOW_PROGRAM = """import json, torch
jump = torch.export.load("jump.pt2").module()
x, label = torch.randn(4, {shape}), torch.tensor({labels})
times = json.load(open("graph.json"))["times"]["2"]
for t, s in zip(times[:-1], times[1:]):
    x = jump(x, torch.full((4,), t), torch.full((4,), s), label)"""


class Jump(nn.Module):
    """G(x, t, s, label)."""

    def __init__(self, network: AbstractNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        """x at time s."""
        return paths.jump(self.network, x, t, s, label)


def export_onnx(run: RunDir, student: TrainedStudent, out: Path, license_id: str) -> Path:
    """`out`, now a folder with the jump as ONNX, tried with onnxruntime.

    Raises:
        ConfigError: a package is not installed.
        LossyExport: onnxruntime computes something else.
    """
    missing = [name for name in PACKAGES if util.find_spec(name) is None]
    check(not missing, f"--format onnx needs {', '.join(missing)}: pip install 'bowstring[onnx]'")
    import onnxruntime

    with replaced(out) as folder:
        _write_onnx(student.network, folder / ONNX)
        session = onnxruntime.InferenceSession(str(folder / ONNX))

        def run_onnx(*inputs: Tensor) -> Tensor:
            named = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}
            return torch.from_numpy(session.run(None, named)[0])

        _check(run_onnx, student.network, folder / ONNX)
        _describe(run, student, folder, Use("onnx", _filled(HOW_ONNX, student)), license_id)
    return out


def export_program(run: RunDir, student: TrainedStudent, out: Path, license_id: str) -> Path:
    """`out`, now a folder with the jump as a program of torch.export.

    Raises:
        LossyExport: the program computes something else.
    """
    with replaced(out) as folder:
        torch.export.save(_program(student.network), folder / PROGRAM)
        _check(torch.export.load(folder / PROGRAM).module(), student.network, folder / PROGRAM)
        _describe(run, student, folder, Use("pytorch", _filled(HOW_PROGRAM, student)), license_id)
    return out


def _program(network: AbstractNetwork) -> torch.export.ExportedProgram:
    return torch.export.export(Jump(network), _inputs(network, TRACED), dynamic_shapes=_any_batch())


def _any_batch() -> dict[str, dict[int, torch.export.Dim]]:
    """The axis of every input whose length is left open."""
    batch = torch.export.Dim("batch")
    return {name: {0: batch} for name in INPUTS}


def _write_onnx(network: AbstractNetwork, path: Path) -> None:
    """Writes a graph with `Dim("batch")` first in every input."""
    size = sum(value.nbytes for value in network.state_dict().values())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter talks about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            _program(network),
            (),
            path,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=_any_batch(),  # for their name alone
            dynamo=True,
            external_data=size > ONE_FILE_BYTES,
        )


def _inputs(network: AbstractNetwork, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fixed batch: jumps of every length, the last class and "none" in turn."""
    x = torch.from_numpy(noise.sample_noise(0, np.arange(count), network.image.shape))
    t = torch.linspace(0, 0.75, count)
    label = torch.where(torch.arange(count) % 2 == 0, network.image.num_classes - 1, -1)
    return x, t, 1 - 0.2 * t, label


@torch.no_grad()
def _check(graph: paths.MeanVelocity, network: AbstractNetwork, what: Path) -> None:
    """Compares a graph with the jump of the network, in batches of other sizes than it was made of.

    Raises:
        LossyExport: they differ by more than TOLERANCE.
    """
    for count in TRIED:
        inputs = _inputs(network, count)
        expected = paths.jump(network, *inputs)
        gap = float((graph(*inputs) - expected).abs().max() / expected.abs().max())
        if not gap <= TOLERANCE:
            raise LossyExport(
                f"{what} is off by {gap:.1e} of the largest value in a batch of {count}, more than "
                f"{TOLERANCE:g}; nothing was written"
            )


def _filled(how: str, student: TrainedStudent) -> str:
    image = student.network.image
    labels = [n % image.num_classes for n in range(4)] if image.num_classes else [-1] * 4
    return how.format(shape=", ".join(str(extent) for extent in image.shape), labels=labels)


def _describe(
    run: RunDir, student: TrainedStudent, folder: Path, use: Use, license_id: str
) -> None:
    """Writes graph.json and the model card."""
    image = student.network.image
    description = {
        "format": "bowstring-graph-1",
        "bowstring": metadata.version("bowstring"),
        "inputs": {
            "x": ["batch", *image.shape],
            "t": ["batch"],
            "s": ["batch"],
            "label": ["batch"],
        },
        "time": "t = 0 noise, t = 1 data; output: x at time s",
        "labels": f"0 to {image.num_classes - 1}, -1 for none" if image.num_classes else "-1",
        "times": {str(nfe): times.sampler_times(nfe, student.middle) for nfe in (1, 2, 3, 4, 8)},
        "meta": student.meta,
    }
    write_json(folder / DESCRIPTION, description)
    write_card(folder, run, student, use, license_id)
