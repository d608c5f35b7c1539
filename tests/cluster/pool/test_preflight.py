"""What is tried before a worker loads its teachers, and who it says it is."""

import os
import stat

import pytest
import torch

from cluster.pool import preflight
from distill.run.files import RunDir


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def test_a_place_that_works_is_left_as_it_was(run):
    preflight.preflight(run, "cpu")
    assert list(run.root.iterdir()) == []


def test_a_run_folder_that_is_not_mounted_here_is_said(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(preflight.UnfitPlace, match=r"the run's folder takes no file: .*run"):
        preflight.preflight(RunDir(tmp_path / "run"), "cpu")


def test_a_full_disk_is_said(run, monkeypatch):
    monkeypatch.setattr(preflight, "MIN_DISK_BYTES", 2**62)
    with pytest.raises(preflight.UnfitPlace, match=r"disk has [\d,]+ bytes left, in"):
        preflight.preflight(run, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is here")
def test_a_device_that_is_not_there_is_said(run):
    with pytest.raises(preflight.UnfitPlace, match=r"its device does not compute: .*"):
        preflight.preflight(run, "cuda")


@pytest.mark.gpu
def test_a_gpu_computes_exactly(run):
    preflight.preflight(run, "cuda")


def test_a_device_that_computes_wrong_is_said(run, monkeypatch):
    """One element of a product is off by one."""
    product = torch.Tensor.__matmul__

    def wrong(a, b):
        found = product(a, b)
        found[3, 5] += a.dtype == torch.float32
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    with pytest.raises(preflight.UnfitPlace, match=r"a product of matrices is off by 1$"):
        preflight.preflight(run, "cpu")


def test_a_worker_says_where_it_is_as_slurm_and_the_driver_say_it(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --id=3 ] && echo "GPU-12ab, NVIDIA H200"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    found = preflight.introduction("host:1", "cuda", "born")
    assert found == preflight.Introduction("host:1", "node7", "GPU-12ab", "NVIDIA H200", "born")
    tool.write_text("#!/bin/sh\nexit 9\n")  # the driver does not know it any more
    assert preflight.introduction("host:1", "cuda", "born").gpu == "3"
    assert preflight.introduction("host:1", "cpu", "born").gpu == ""
