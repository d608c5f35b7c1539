"""A finished run in miniature: a checkpoint, its teacher, and what evaluation and report read."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import fsspec
import hypothesis
import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from distill.checkpoint import commit as checkpoint
from distill.config import TrainConfig
from distill.datasets.config import DataConfig
from distill.engine.engine import TorchEngine
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.networks.files import save_model
from distill.run.events import Commit, Lease, Pool, Resume, WorkerJoin, append
from distill.run.files import RunDir, write_json
from distill.run.measured import Metrics, append_metrics
from distill.teachers.config import NativeConfig, TeacherConfig
from distill.testing import write_tiny_record

DIGITS = DataConfig(name="digits", channels=1, size=8, num_classes=10)
PAGE = 5
TINY = DiTConfig(patch_size=4, width=16, depth=1, num_heads=2)

# Tests that start Ray, Slurm or several ranks follow one another in one of pytest's processes, with
# one server to fork ranks from; what needs one core goes on beside them in the others.
MACHINES = (
    "tests/chaos/",
    "tests/slurm/",
    "tests/cluster/pool/test_object_store.py",
    "tests/cluster/pool/test_sick.py",
    "tests/cluster/pool/test_worker.py",
    "tests/cluster/plan/test_memory.py",
    "tests/cluster/state/test_workers.py",
    "tests/cluster/supervisor/test_older_run.py",
    "tests/cluster/supervisor/test_recursion.py",
    "tests/cluster/trainer/",
    "tests/distill/checkpoint/test_killed_saves.py",
    "tests/distill/test_testing.py",
    "tests/distill/training/test_memory.py",
)

hypothesis.settings.register_profile("bowstring", deadline=None)  # others work on this machine
hypothesis.settings.load_profile("bowstring")

# Ranks are forked from a process that has imported torch and DeepSpeed, which takes seconds. What a
# first engine of DeepSpeed imports besides takes seconds more.
LAZY = ["torch._inductor.compile_fx", "networkx"]
multiprocessing.set_forkserver_preload(
    [
        "cluster.trainer.zero",
        "distill.testing",
        "distill.objectives.build",
        "distill.training.loop",
        *LAZY,
    ]
)


class ByFile(LoadFileScheduling):
    """The tests of a file share its fixtures, and those of MACHINES one process (`pytest -n`)."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "machines" if file.startswith(MACHINES) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """Which process takes which tests."""
    return ByFile(config, log)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a line with what a test has measured; all stand at the end of what pytest prints."""
    name, found = request.node.name, request.node.user_properties
    return lambda line: found.append(("measured", f"{name}: {line}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what `measured` took, of tests in any process."""
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    found = (report.user_properties for report in reports if isinstance(report, pytest.TestReport))
    lines = dict.fromkeys(line for pairs in found for key, line in pairs if key == "measured")
    if lines:
        terminalreporter.section("measured")
    for line in lines:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> RunDir:
    """A run whose student is its teacher: the second-time branch is still inert, so G is Euler."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "tiny")
    network = build_network(TINY, DIGITS.image, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a fresh network has zero output; give it a curved field
        for name, parameter in network.named_parameters():
            if not name.startswith("s_embedder") and parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_model(run.teacher.model(3), network.state_dict(), TINY, DIGITS.image, {"kind": "teacher"})
    engine = TorchEngine(network, TrainConfig(), torch.device("cpu"))
    snapshot = checkpoint.take_snapshot(20, engine, origin={"seed": 0})
    checkpoint.commit(run.checkpoints, snapshot, engine, keep_last=2)
    identity = {"student": asdict(TINY), "data": asdict(DIGITS), "objective": {"name": "traflow"}}
    write_tiny_record(run, identity, tiny="cd" * 32)
    write_json(run.shards / "00000000.json", {"seconds": 2.0, "nfe": 512, "bytes": 1000})
    append(
        run,
        Pool(1, 4, time=0.0),
        WorkerJoin("w", {}, time=5.0),
        Lease(0, "w", time=5.0),
        Commit(0, "w", 1000, 2.0, time=7.0),
        Resume(0, 2),
    )
    for step in (10, 20):
        terms = {"output": 0.1 / step, "velocity": 0.2 / step}
        speed = {"samples_per_s": 50.0, "step_s": 0.5, "data_wait_fraction": 0.1, "world_size": 2}
        speed |= {"phases_s": {"forward": 0.4, "data": 0.05}, "peak_memory_bytes": 3_000_000_000}
        speed |= {"flops_per_s": 4e9, "mfu": 0.125, "lr": 1e-3, "grad_norm": 2.0 / step}
        append_metrics(run, Metrics(step, loss=0.3 / step, terms=terms, **speed))
    return run


@pytest.fixture(scope="session")
def teachers(finished_run) -> dict[str, TeacherConfig]:
    """The teacher of `finished_run`, without guidance."""
    path = str(finished_run.teacher.model(3))
    return {"tiny": NativeConfig(path=path, solver="heun", steps=8)}


@pytest.fixture(scope="session")
def data() -> DataConfig:
    """Real digits."""
    return DIGITS


@pytest.fixture(scope="session")
def bucket(tmp_path_factory) -> Iterator[str]:
    """URL of a bucket on a server that speaks S3: moto's, a process on this machine.

    A page of a list has PAGE names, not 1,000, so that small tests need several.
    """
    log = tmp_path_factory.mktemp("s3") / "log.txt"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("w") as file:
        environment = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    deadline = time.monotonic() + 30
    while "Running on " not in log.read_text():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    address = log.read_text().partition("Running on ")[2].split()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bowstring")
        yield "s3://bowstring"
    server.terminate()
    server.wait()
