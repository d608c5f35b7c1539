"""Whether a place can make shards at all: tried before a worker loads its teachers."""

import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.plan.placement import Device
from distill.run.files import RunDir, write_atomic

SIZE = 256  # of the matrices
MIN_DISK_BYTES = 10**8
QUERY_S = 30.0  # a driver that hangs is no answer


class UnfitPlace(RuntimeError):
    """This node or GPU can make no shard of this run, and to try again there is of no use."""


@dataclass(frozen=True)
class Introduction:
    """Who a worker is. `birth` is the node of Ray that it came with, `model` its device's."""

    worker: str
    node: str
    gpu: str
    model: str
    birth: str


def introduction(worker: str, device: Device, birth: str) -> Introduction:
    """Of this process; the node's name is the one Slurm has for it. CUDA is not touched yet."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    gpu, model = gpu_of_this_process() if device == "cuda" else ("", "cpu")
    return Introduction(worker, node, gpu, model, birth)


def gpu_of_this_process() -> tuple[str, str]:
    """Its UUID and model, by the driver; its number where the driver does not say."""
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={number}", "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S, check=True)
        uuid, _, model = said.stdout.strip().partition(", ")
    except (OSError, subprocess.SubprocessError):
        return number, ""
    return uuid, model


def preflight(run: RunDir, device: Device) -> None:
    """Raises UnfitPlace unless the device computes, its memory is free, and disk and run folder
    take files.
    """
    check_device(device)
    for folder, what in ((Path(tempfile.gettempdir()), "disk"), (run.root, "the run's folder")):
        _check_folder(folder, what)


def check_device(device: Device | torch.device) -> None:
    """Raises UnfitPlace unless the device computes. A product of matrices of small integers is
    exact in float32, whatever sums it up.
    """
    factor = torch.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 7
    expected = factor.double() @ factor.double().T
    try:
        found = (factor.float().to(device) @ factor.float().T.to(device)).double().cpu()
    except RuntimeError as error:
        raise UnfitPlace(f"its device does not compute: {error}") from error
    if not torch.equal(found, expected):
        off = (found - expected).abs().max()
        raise UnfitPlace(f"its device computes wrong: a product of matrices is off by {off:g}")


def _check_folder(folder: Path, what: str) -> None:
    path = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        write_atomic(path, os.urandom(2**16))
        path.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UnfitPlace(f"{what} takes no file: {error}") from error
    if free < MIN_DISK_BYTES:
        raise UnfitPlace(f"{what} has {free:,} bytes left, in {folder}")
