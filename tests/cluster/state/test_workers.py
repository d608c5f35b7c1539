"""`bowstring scale` on a live run with real Ray actors, and how many workers fit on a cluster."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.inspect.status import status
from cluster.inspect.verify import audit
from cluster.settings.file import save_config
from cluster.settings.hydra import compose
from cluster.settings.schema import ClusterConfig, TeacherPoolConfig, TrainerConfig
from cluster.state.workers import wanted_workers
from distill.config import ConfigError
from distill.run.events import SCALED_DOWN, WorkerJoin, WorkerLeave, read_events, replay
from distill.run.files import RunDir, write_json

BOWSTRING = [sys.executable, "-m", "cluster.cli.main"]
SHARDS = 20_000  # more than can be made while the test runs


@pytest.fixture
def run(tmp_path):
    """A run of one teacher actor on a closed-form teacher."""
    mixture = {"shape": [1, 8, 8], "means": [[-0.5] * 64, [0.5] * 64], "stds": [0.2, 0.1]}
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    teacher = "{kind: analytic, path: " + str(tmp_path / "mixture.json") + ", steps: 32}"
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={tmp_path / 'run'}",
            "data.num_classes=0",
            "~teacher",
            "+teacher={mixture: " + teacher + "}",
            f"train.max_steps={2 * SHARDS}",
            "cluster.teachers.num_workers=1",
            "cluster.trainer.num_workers=1",
        ]
    )
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    save_config(run, config)
    return run


def scale(run, workers):
    return subprocess.run(
        [*BOWSTRING, "scale", str(run.root), str(workers)], capture_output=True, text=True
    )


def wait_until(process, log, condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_a_run_that_is_not_live_is_not_scaled(run):
    result = scale(run, 3)
    assert result.returncode == 2
    assert "is not running; start it with cluster.teachers.num_workers=3" in result.stderr


@pytest.mark.timeout(600)  # half a minute on two idle cores
def test_a_live_run_follows_its_target(run, tmp_path):
    """1 -> 3 -> 1 workers; those that leave finish their shard, and nothing is lost or doubled."""
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*BOWSTRING, "generate", str(run.root)],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def teachers():
        return status(run)["teachers"] if run.events.exists() else None

    try:
        for workers in (1, 3, 1):
            if teachers() is not None:
                assert scale(run, workers).returncode == 0
            target = {"target": workers, "workers": workers}
            wait_until(process, log, lambda target=target: teachers() == target)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.kill()

    events = list(read_events(run))
    joined = {event.worker for event in events if isinstance(event, WorkerJoin)}
    drained = [
        (index, event.worker)
        for index, event in enumerate(events)
        if isinstance(event, WorkerLeave) and event.reason == SCALED_DOWN
    ]
    assert len(joined) == 3 and len({worker for _, worker in drained}) == 2
    for index, worker in drained:
        assert worker not in {lease.worker for lease in replay(events[:index]).leases.values()}
    report = audit(run)
    assert report["ok"], report
    assert report["shards"] > 3 and report["produced_again"] == []


# -----------------------------------------------------------------------------------------------
# What fits on a cluster


def cluster_of_two_ranks(**teachers):
    """Settings of a pool beside two trainer ranks."""
    pool, trainer = TeacherPoolConfig(**teachers), TrainerConfig(num_workers=2)
    return ClusterConfig(address="there", teachers=pool, trainer=trainer)


def node(alive=True, **resources):
    """A node as Ray tells of it."""
    return {"Alive": alive, "Resources": {name: float(n) for name, n in resources.items()}}


def test_as_many_workers_are_wanted_as_fit_next_to_the_trainer(tmp_path):
    """Two ranks of one core each; a worker takes one core."""
    run = RunDir(tmp_path)
    config = cluster_of_two_ranks(num_workers=1)
    empty = node(CPU=8)  # offers no place for teachers
    both = node(CPU=4, teacher=4, trainer=8)
    teachers = node(CPU=4, teacher=3)
    for nodes, wanted in (
        ([], 1),  # one is asked for in any case, and waits
        ([empty], 1),
        ([both], 2),
        ([both, teachers], 5),
        ([both, node(alive=False, CPU=4, teacher=3)], 2),
    ):
        assert wanted_workers(config, run, nodes) == {"cuda": 0, "cpu": wanted}
    config.teachers.max_workers = 4
    assert wanted_workers(config, run, [both, teachers]) == {"cuda": 0, "cpu": 4}
    write_json(run.target, {"workers": 0})  # `bowstring scale RUN 0`
    assert wanted_workers(config, run, [both, teachers]) == {"cuda": 0, "cpu": 0}
    config.address = ""
    run.target.unlink()  # on one machine nothing comes or goes
    assert wanted_workers(config, run, [both]) == {"cuda": 0, "cpu": 1}


def test_gpus_are_filled_first_and_nodes_without_one_take_workers_on_cpu(tmp_path):
    run = RunDir(tmp_path)
    config = cluster_of_two_ranks(num_workers=1)
    config.teachers.gpus_per_worker = 0.5
    plain, gpu = node(CPU=4, teacher=3), node(CPU=4, teacher=3, GPU=1)
    assert wanted_workers(config, run, []) == {"cuda": 1, "cpu": 0}  # waits for a GPU
    assert wanted_workers(config, run, [plain, gpu]) == {"cuda": 2, "cpu": 3}
    for asked, cuda, cpu in ((1, 1, 0), (4, 2, 2), (9, 2, 3)):
        write_json(run.target, {"workers": asked})
        assert wanted_workers(config, run, [plain, gpu]) == {"cuda": cuda, "cpu": cpu}
    config.teachers.gpus_per_worker = 0.0
    assert wanted_workers(config, run, [plain, gpu]) == {"cuda": 0, "cpu": 6}


def test_a_limit_below_the_least_is_refused():
    with pytest.raises(
        ConfigError, match=r"max_workers=1 is less than cluster\.teachers\.num_work"
    ):
        cluster_of_two_ranks(num_workers=2, max_workers=1)
