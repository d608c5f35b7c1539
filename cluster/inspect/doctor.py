"""What works on this machine: packages, devices, memory, ports, and the file system below a runs
folder.

Every check is one row: ok, "warn" (a run works, with less) or "bad" (a run cannot work here).
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich import console, table

from distill.run.files import sync_directory

OK, WARN, BAD = "ok", "warn", "bad"
# What needs an extra. `train` is what a run needs; `dev` and `docs` are for who changes Bowstring.
EXTRAS = {
    "diffusers": "teacher.kind=diffusers, export --format diffusers, encode with AutoencoderKL",
    "onnx": "export --format onnx",
    "s3": "trajectory.location=s3://...",
    "wandb": "train.wandb=PROJECT",
    "sweep": "hydra/launcher=submitit_slurm",
    "dev": "make test",
    "docs": "the pages as a site: make docs",
}
# Ray's object store lies there; below this it falls back to a slow disk file.
SHARED_MEMORY = Path("/dev/shm")
MIN_SHM_BYTES = 256 * 2**20
MIN_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it is, and what was seen or has to be done."""

    name: str
    state: str
    detail: str


# -----------------------------------------------------------------------------------------------
# Software


def packages() -> list[Finding]:
    """Python and every dependency of bowstring with its version, compared with what is required."""
    is_new = sys.version_info >= (3, 10)
    found = [Finding("python", OK if is_new else BAD, platform.python_version())]
    needed = [*requirements(""), *requirements("train")]
    return found + [_package(one, "train") for one in needed]


def extras() -> list[Finding]:
    """Every extra: whether its packages are here, and what needs them."""
    found = []
    for extra, user in EXTRAS.items():
        lacking = [row for one in requirements(extra) if (row := _package(one, extra)).state != OK]
        said = "; ".join(f"{row.name} {row.detail}" for row in lacking[:1])
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        state, detail = (WARN, f"{said}{more}; for {user}") if lacking else (OK, f"for {user}")
        found.append(Finding(f"extra {extra}", state, detail))
    return found


def requirements(extra: str) -> list[Requirement]:
    """What bowstring requires always, for "", or what an extra adds."""
    every = [Requirement(line) for line in importlib.metadata.requires("bowstring") or []]
    always = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    with_it = [one for one in every if one.marker and one.marker.evaluate({"extra": extra})]
    return [one for one in with_it if one not in always]


def _package(requirement: Requirement, extra: str) -> Finding:
    """One package, compared with what is required."""
    try:
        have = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, BAD, f"missing; pip install 'bowstring[{extra}]'")
    fits = requirement.specifier.contains(have, prereleases=True)
    detail = have if fits else f"{have}, needs {requirement.specifier}"
    return Finding(requirement.name, OK if fits else BAD, detail)


def accelerators() -> list[Finding]:
    """Devices that torch sees, and the backends that ranks can talk over."""
    try:
        import torch
        from torch import distributed
    except ImportError as error:
        return [Finding("accelerator", BAD, f"torch cannot be imported: {error}")]
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            found.append(Finding(f"accelerator {index}", OK, f"{device.name}, {memory}"))
    else:
        found.append(Finding("accelerator", WARN, "none; everything runs on the CPU"))
    if not distributed.is_available():
        return [*found, Finding("collectives", BAD, "torch was built without torch.distributed")]
    backends = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    there = ", ".join(name for name, is_there in backends.items() if is_there)
    return [*found, Finding("collectives", OK if backends["gloo"] else BAD, there or "none")]


# -----------------------------------------------------------------------------------------------
# Hardware


def cores() -> int:
    """Cores this process may use; a container or a Slurm job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its control group's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            machine = min(machine, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return machine


def hardware() -> list[Finding]:
    """Cores, threads per process, memory and shared memory."""
    count, memory = cores(), memory_bytes()
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    found = [
        Finding("cores", OK if count >= 2 else WARN, f"{count} usable, OMP_NUM_THREADS {threads}"),
        Finding("memory", OK if memory >= MIN_MEMORY_BYTES else WARN, f"{memory / 2**30:.1f} GiB"),
    ]
    if SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(SHARED_MEMORY)
        enough = shared.free >= MIN_SHM_BYTES
        detail = f"{shared.free / 2**20:.0f} MiB free of {shared.total / 2**20:.0f}"
        detail += "" if enough else "; in a container start it with --shm-size=1g"
        found.append(Finding(str(SHARED_MEMORY), OK if enough else WARN, detail))
    else:
        words = "missing, and Ray needs it; mount a tmpfs there"
        found.append(Finding(str(SHARED_MEMORY), BAD, words))
    return found


def ports() -> list[Finding]:
    """Whether this machine gives ports on its loopback address, and where its ephemeral range
    starts.
    """
    sockets = []
    try:
        for _ in range(16):
            opened = socket.socket()
            sockets.append(opened)
            opened.bind(("127.0.0.1", 0))
    except OSError as error:
        return [Finding("ports", BAD, f"cannot bind a port on 127.0.0.1: {error.strerror}")]
    finally:
        for opened in sockets:
            opened.close()
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = re.findall(r"\d+", limits.read_text())[0] if limits.exists() else "unknown"
    return [Finding("ports", OK, f"16 of 16 bound; ephemeral range from {first}")]


# -----------------------------------------------------------------------------------------------
# File system


def file_system(folder: Path) -> list[Finding]:
    """Whether the file system below `folder` renames, links, locks and syncs as a run needs.

    Writes into a temporary folder there and removes it.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
            found = [_rename(Path(name)), _link(Path(name)), _lock(Path(name)), _sync(Path(name))]
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [
            Finding(f"{folder}", BAD, f"cannot be written: {error.strerror}; choose run.dir=...")
        ]
    if created:
        folder.rmdir()
    return [*found, Finding("disk", OK if free > 10**9 else WARN, f"{free / 1e9:.1f} GB free")]


def _rename(folder: Path) -> Finding:
    """A file and a folder appear under their final names in one step, over what was there."""
    (folder / "old").write_text("old")
    (folder / "new").write_text("new")
    (folder / "new").replace(folder / "old")
    (folder / "stage").mkdir()
    (folder / "stage").rename(folder / "done")
    whole = (folder / "old").read_text() == "new" and (folder / "done").is_dir()
    return Finding("rename", OK if whole else BAD, "atomic replace of files, rename of folders")


def _link(folder: Path) -> Finding:
    """A hard link fails when the name is taken: the way the first of two producers wins."""
    (folder / "source").write_text("x")
    try:
        os.link(folder / "source", folder / "target")
        os.link(folder / "source", folder / "target")
    except FileExistsError:
        return Finding("link", OK, "the first of two writers wins")
    except OSError as error:
        return Finding("link", WARN, f"no hard links here ({error.strerror})")
    return Finding("link", BAD, "a second link replaced the first")


def _lock(folder: Path) -> Finding:
    """A second lock of the same file is refused."""
    path = folder / "lock"
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("lock", BAD, f"flock does not work here ({error.strerror})")
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("lock", OK, "a second owner is refused")
    return Finding("lock", BAD, "two owners got the same lock; two supervisors could run at once")


def _sync(folder: Path) -> Finding:
    """fsync of a file and of its folder, with the time they take."""
    start = time.monotonic()
    with (folder / "data").open("wb") as file:
        file.write(bytes(2**20))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(folder)
    return Finding("fsync", OK, f"1 MiB in {(time.monotonic() - start) * 1000:.0f} ms")


# -----------------------------------------------------------------------------------------------


def examine(folder: Path) -> list[Finding]:
    """All findings; `folder` is where runs will live."""
    software = [*packages(), *extras(), *accelerators()]
    return [*software, *hardware(), *ports(), *file_system(folder)]


def show(folder: Path, as_json: bool) -> int:
    """Prints the findings; 1 when a run cannot work here."""
    found = examine(folder)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        rows = table.Table("", "state", "found")
        colours = {OK: "green", WARN: "yellow", BAD: "red"}
        for finding in found:
            state = f"[{colours[finding.state]}]{finding.state}[/]"
            rows.add_row(finding.name, state, finding.detail)
        console.Console().print(rows)
    return 1 if any(finding.state == BAD for finding in found) else 0
