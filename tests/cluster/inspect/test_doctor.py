"""File system checks pass on a good folder, fail on an impossible one, and leave nothing."""

import importlib.metadata
from pathlib import Path

import pytest

from cluster.inspect import doctor
from cluster.inspect.doctor import (
    BAD,
    OK,
    cores,
    file_system,
    hardware,
    memory_bytes,
    packages,
    ports,
)


def test_a_good_folder_passes_and_is_left_as_it_was(tmp_path: Path):
    found = {finding.name: finding.state for finding in file_system(tmp_path / "runs")}
    assert {name: found[name] for name in ("rename", "lock", "fsync")} == {
        "rename": OK,
        "lock": OK,
        "fsync": OK,
    }
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_bad(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (finding,) = file_system(tmp_path / "file" / "runs")
    assert finding.state == BAD
    assert "run.dir=" in finding.detail


def test_packages_and_ports_of_this_environment_are_fine():
    names = {finding.name for finding in packages()}
    assert {"python", "hydra-core", "torch", "ray", "deepspeed"} <= names
    assert all(finding.state == OK for finding in [*packages(), *ports()])


def test_cores_and_memory_are_counted():
    assert cores() >= 1
    assert memory_bytes() > 2**20


def test_a_machine_without_shared_memory_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.inspect.doctor.SHARED_MEMORY", tmp_path / "none")
    (finding,) = [finding for finding in hardware() if finding.name == str(tmp_path / "none")]
    assert (finding.state, finding.detail) == (
        BAD,
        "missing, and Ray needs it; mount a tmpfs there",
    )


def test_every_extra_is_listed_with_what_needs_it():
    known = set(importlib.metadata.metadata("bowstring").get_all("Provides-Extra")) - {"train"}
    assert set(doctor.EXTRAS) == known
    found = {finding.name: finding for finding in doctor.extras()}
    assert found["extra onnx"].state == OK and "export --format onnx" in found["extra onnx"].detail


def test_a_missing_extra_is_a_warning_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    (found,) = [finding for finding in doctor.extras() if finding.name == "extra wandb"]
    assert found.state == doctor.WARN
    assert found.detail == (
        "wandb missing; pip install 'bowstring[wandb]'; for train.wandb=PROJECT"
    )
