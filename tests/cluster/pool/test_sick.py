"""A sick node among good ones, with real Ray: the run goes on, and knows which it is.

The nodes are this machine. Each worker holds the first of some files that no other worker holds,
and is on the node of that number.
"""

import subprocess
import sys

import pytest

from cluster.inspect.status import status
from cluster.inspect.verify import audit
from cluster.settings.file import save_config
from cluster.settings.hydra import compose
from cluster.state.workers import sick_nodes
from distill.run.events import Fail, WorkerLeave, read_events
from distill.run.files import RunDir

SHARDS = 30
# Every worker of node 1 fails, each in the next of three ways.
GENERATE = """
import fcntl, os, signal, sys, time
from dataclasses import replace
from pathlib import Path
from cluster.pool import pool
from cluster.pool.worker import TeacherWorker
from cluster.settings.file import load_config
from cluster.supervisor import runner
from distill.run.files import RunDir

class SickWorker(TeacherWorker):
    def introduce(self, birth):
        for self.number in range(9):
            self.file = (self._run.root.parent / f"place{self.number}").open("a")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
        return replace(super().introduce(birth), node=f"node{self.number}")

    def way(self):
        if self.number != 1:
            return None
        tries = self._run.root.parent / "tries"
        with tries.open("a") as file:
            file.write("x")
        return len(tries.read_text())

    def load(self):
        self.sickness = self.way()
        if self.sickness == 1:
            raise OSError("Stale file handle")
        return super().load()

    def produce(self, shard):
        match self.sickness:
            case None:  # good workers leave something for the sick one
                while shard >= 15 and not (self._run.root.parent / "struck").exists():
                    time.sleep(0.1)
            case 2:
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            case 3:
                (self._run.root.parent / "struck").touch()
                for teacher in self._teachers.values():
                    teacher.velocity = lambda x, *_: x * float("nan")
        return super().produce(shard)

pool.TeacherWorker = SickWorker
sys.exit(runner.generate(load_config(RunDir(Path(sys.argv[1])))))
"""


@pytest.mark.timeout(400)
def test_a_sick_node_costs_a_run_no_shard(tmp_path):
    mixture = tmp_path / "mixture.json"
    mixture.write_text('{"shape": [1, 1, 1], "means": [[-0.5], [0.5]], "stds": [0.2, 0.1]}')
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={tmp_path / 'run'}",
            "data.num_classes=0",
            "data.channels=1",
            "data.size=1",
            "~teacher",
            "+teacher={mixture: {kind: analytic, path: " + str(mixture) + ", steps: 8}}",
            f"train.max_steps={2 * SHARDS}",
            "cluster.teachers.num_workers=3",
        ]
    )
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    save_config(run, config)
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(run.root)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = audit(run)
    assert report["missing"] == report["corrupt"] == report["duplicate"] == []
    failed = [event.error for event in read_events(run) if isinstance(event, Fail)]
    left = [event.reason for event in read_events(run) if isinstance(event, WorkerLeave)]
    assert "could not load its teachers: OSError: Stale file handle" in left
    assert len(failed) == 2 and "uncorrectable ECC" in failed[0] and "not finite" in failed[1]
    assert list(sick_nodes(run)) == ["node1"] and "not finite" in sick_nodes(run)["node1"]
    (excluded,) = status(run)["excluded"]
    assert (excluded["node"], excluded["gpu"]) == ("node1", "all")
