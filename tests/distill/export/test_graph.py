"""One jump as a graph: the numbers of the network in batches of any size, and images by a loop."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from distill.config import ConfigError, ImageSpec, LossyExport
from distill.export import graph
from distill.export.build import export_student
from distill.flow import paths
from distill.flow.noise import sample_noise
from distill.sample import few_step
from tests.distill.export.test_diffusers import network_of, run_of

STUDENTS = {"dit": ImageSpec(1, 16, 10), "unet": ImageSpec(3, 8, 0)}  # 64 tokens: fused attention


@pytest.fixture(scope="module", params=STUDENTS)
def network(request):
    return network_of(request.param, STUDENTS[request.param])


@pytest.fixture(scope="module")
def run(network, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run") / "run", network)


def as_callable(form, folder):
    """The jump as a function of tensors, by a runtime that knows nothing of the network."""
    if form == "torch":
        return torch.export.load(folder / "jump.pt2").module()
    onnx.checker.check_model(folder / "jump.onnx")
    session = onnxruntime.InferenceSession(folder / "jump.onnx")
    assert [part.shape[0] for part in session.get_inputs()] == ["batch"] * 4
    names = [part.name for part in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0]
    )


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_graph_jumps_and_samples_as_the_student_does(run, network, tmp_path, form):
    folder = export_student(run, form, tmp_path / "out", False, "fp32", "mit")
    jump = as_callable(form, folder)
    for count in (1, 4, 7):
        x = torch.from_numpy(sample_noise(1, np.arange(count), network.image.shape))
        t = torch.rand(count, generator=torch.manual_seed(0))
        label = torch.arange(count) % (network.image.num_classes + 1) - 1
        expected = paths.jump(network, x, t, (t + 1) / 2, label)
        scale = float(expected.abs().max())
        assert float((jump(x, t, (t + 1) / 2, label) - expected).abs().max()) < 1e-4 * scale
    times = json.loads((folder / "graph.json").read_text())["times"]
    for nfe in (1, 2, 4):
        images = x
        for t, s in zip(times[str(nfe)][:-1], times[str(nfe)][1:], strict=True):
            images = jump(images, torch.full((7,), t), torch.full((7,), s), label)
        expected = few_step(network, x, label, nfe)
        assert float((images - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_graph_that_is_off_is_refused(run, tmp_path, monkeypatch):
    jump, calls = paths.jump, []

    def other_afterwards(*given):
        calls.append(given)
        return jump(*given) + 0.01 * (len(calls) > 1)

    monkeypatch.setattr(graph.paths, "jump", other_afterwards)
    with pytest.raises(LossyExport, match=r"jump.pt2 is off by"):
        export_student(run, "torch", tmp_path / "out", False, "fp32", "mit")
    assert list(tmp_path.iterdir()) == []


def test_without_a_package_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(
        ConfigError, match=r"needs no_such_package: pip install 'bowstring\[onnx\]'"
    ):
        export_student(run, "onnx", tmp_path / "out", False, "fp32", "mit")
