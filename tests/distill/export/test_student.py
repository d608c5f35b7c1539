"""Export: the evaluation average, bit for bit, with where it comes from."""

import json

import pytest
import torch

from distill.checkpoint import commit as checkpoint
from distill.checkpoint.manifest import latest_verified
from distill.config import ConfigError
from distill.export.student import export_run, latest_student
from distill.run.files import RunDir
from distill.run.identity import record_of
from distill.sample import few_step, load_student


def test_export_holds_the_evaluation_average_bit_for_bit(finished_run, tmp_path):
    student = load_student(export_run(finished_run, tmp_path / "out"), "cpu")
    _, folder = latest_verified(finished_run.checkpoints)
    state = student.network.state_dict()
    for name, value in checkpoint.read_average(folder, "evaluation").items():
        assert torch.equal(state[name], value), name


def test_two_exports_give_the_same_images(finished_run, tmp_path):
    first = load_student(export_run(finished_run, tmp_path / "a"), "cpu")
    second = load_student(export_run(finished_run, tmp_path / "b"), "cpu")
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    a, b = (few_step(s.network, noise, labels, 2) for s in (first, second))
    assert torch.equal(a, b)
    assert torch.equal(first.sample(4, nfe=2), second.sample(4, nfe=2))


def test_model_json_says_where_the_model_comes_from(finished_run, tmp_path):
    folder = export_run(finished_run, tmp_path / "out")
    meta = json.loads((folder / "model.json").read_text())["meta"]
    assert meta == {
        "kind": "student",
        "objective": "traflow",
        "step": 20,
        "run": "tiny",
        "config_sha256": record_of(finished_run).hash,
        "teachers": {"tiny": "cd" * 32},
    }


def test_latest_student_exports_once(finished_run):
    folder = latest_student(finished_run)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert latest_student(finished_run) == folder == finished_run.model(20)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_without_checkpoints_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        export_run(RunDir(tmp_path / "empty"), tmp_path / "out")
