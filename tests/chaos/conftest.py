"""A small run whose processes can be killed, and what must hold of it after any fault."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster.compose import compose
from cluster.configfile import save_config
from cluster.job import stream_order
from cluster.plan import stream_plan
from cluster.progress import last_step
from cluster.verify import audit
from distill.generate import generate_shard
from distill.layout import stored_dtype
from distill.ledger import shard_spec
from distill.rundir import RunDir, read_lines
from distill.shards import read_shard, write_shard
from distill.store import read_sidecar
from distill.teachers import build_teacher

DRIVER = Path(__file__).parent / "driver.py"
DEADLINE_S = 240.0


class Chaos:
    """A run of two teacher workers and one trainer rank on a closed-form teacher."""

    def __init__(self, folder, *overrides):
        self.folder, self.run = folder, RunDir(folder / "run")
        self.alone = RunDir(folder / "alone")  # what an undisturbed process makes
        mixture = {"shape": [1, 8, 8], "means": [[-0.5] * 64, [0.5] * 64], "stds": [0.2, 0.1]}
        for name in ("beats", "doom", "struck", "run"):
            (folder / name).mkdir()
        (folder / "mixture.json").write_text(json.dumps(mixture))
        path = folder / "mixture.json"
        (self.config,) = compose(
            [
                "experiment=tiny",
                f"run.dir={self.run.root}",
                "~teacher",
                "+teacher={mixture: {kind: analytic, path: " + str(path) + ", steps: 8}}",
                "train.max_steps=120",
                "train.save_every=5",
                "cluster.trainer.num_workers=1",
                *overrides,
            ]
        )
        save_config(self.run, self.config)
        # Ray makes its workers nice, and beside other work they would starve.
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        self.supervisor = None

    def limit_bytes(self, num_bytes):
        """Sets the room for shards."""
        self.config.trajectory.max_bytes = num_bytes
        save_config(self.run, self.config)

    def doom(self, shard, point):
        """Has the first worker that takes `shard` die at `point` (`driver.py`)."""
        (self.folder / f"doom/{shard:08d}").write_text(point)

    def struck(self):
        """The dooms that were met, one file each, as old as the death."""
        return sorted((self.folder / "struck").iterdir())

    # -- Processes

    def start(self, stage="distil"):
        """Starts a supervisor."""
        with (self.folder / "log.txt").open("a") as log:
            command = [sys.executable, str(DRIVER), str(self.run.root), stage]
            self.supervisor = psutil.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=self.env
            )

    @property
    def log(self):
        """What the supervisors said, for the message of a failed test."""
        return (self.folder / "log.txt").read_text()

    def until(self, condition):
        """Waits, as long as the supervisor lives."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.supervisor.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def until_step(self, step):
        """Waits for the training."""
        self.until(lambda: last_step(self.run.metrics) >= step)

    def finish(self):
        """Waits for the end, which must be a good one."""
        assert self.supervisor.wait(timeout=DEADLINE_S) == 0, self.log

    def processes(self, name):
        """Live processes of the supervisor whose command line holds `name`."""
        found = []
        for process in self.supervisor.children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill_all(self):
        """kill -9 of the supervisor and of all that it has started."""
        everyone = [*self.supervisor.children(recursive=True), self.supervisor]
        for process in everyone:
            process.suspend()  # nobody reacts to the death of another
        for process in everyone:
            process.kill()
        self.supervisor.wait()

    # -- What was measured

    def events(self, kind):
        """Events of one kind."""
        return [event for event in read_lines(self.run.events) if event["kind"] == kind]

    def next_event_s(self, since, *kinds):
        """Seconds from `since` to the first event of `kinds` after it."""
        later = (e for e in read_lines(self.run.events) if e["kind"] in kinds)
        return next((e["time"] - since for e in later if e["time"] > since), float("nan"))

    def recovery_s(self, shard):
        """Seconds from the death of the worker that made `shard` until the shard was there."""
        died = (self.folder / f"struck/{shard:08d}").stat().st_mtime
        times = [e["time"] for e in self.events("commit") if e["shard"] == shard]
        return max(times, default=died) - died

    def wasted_nfe(self):
        """Velocity evaluations that are in no shard, and those that are in one."""
        beats = sum(path.stat().st_size for path in (self.folder / "beats").iterdir())
        kept = sum(read_sidecar(self.run, shard).nfe for shard in self.all_shards())
        return beats * self.config.trajectory.batch_size - kept, kept

    # -- The invariant

    def check(self):
        """Nothing lost, nothing twice, the same sequence and the same states as without a fault."""
        report = audit(self.run)
        assert report["ok"], report
        assert report["missing"] == [] and report["duplicate"] == []
        assert report["consumed_steps"] == self.config.train.max_steps
        assert self._consumed() == self._planned()
        made = {shard: read_sidecar(self.run, shard).sha256 for shard in self.all_shards()}
        self.make_alone()
        alone = {shard: read_sidecar(self.alone, shard).sha256 for shard in self.all_shards()}
        assert made == alone

    def all_shards(self):
        """Numbers of the shards of the run."""
        return range(stream_plan(self.config).shards)

    def _consumed(self):
        """Hash of the (id, pass) of every step as the trainer logged it, last time it took it."""
        found = {}
        for event in self.events("steps"):
            found.update({s: event["ids_sha256"] for s in range(event["first"], event["last"] + 1)})
        return found

    def _planned(self):
        order = stream_order(self.config)
        return {
            step: hashlib.sha256(order.entries(step)[0].astype("<i8").tobytes()).hexdigest()
            for step in range(self.config.train.max_steps)
        }

    def make_alone(self):
        """Has one process make every shard, one after the other, into the run `alone`."""
        config, spec = self.config, self._spec()
        teachers = {name: build_teacher(t, "cpu") for name, t in config.teacher.items()}
        for shard in self.all_shards():
            made = generate_shard(
                teachers, config.teacher, config.trajectory, config.seed, shard, "cpu"
            )
            write_shard(self.alone, spec, shard, made, 0.0, "test")

    def read(self, run, shard):
        """Sidecar and states of a shard of `self.run` or `self.alone`."""
        spec = self._spec()
        count = spec.samples_per_shard
        states = np.empty((count, *spec.sample_shape), dtype=stored_dtype(spec))
        return read_shard(run, spec, shard, states, np.empty(count, dtype=np.int64)), states

    def _spec(self):
        config = self.config
        prints = {n: build_teacher(t, "cpu").fingerprint for n, t in config.teacher.items()}
        return shard_spec(config.seed, config.data.image, config.trajectory, config.teacher, prints)


@pytest.fixture
def chaos(tmp_path):
    """Makes runs; whatever they have started ends with the test."""
    made = []

    def make(*overrides):
        made.append(Chaos(tmp_path, *overrides))
        return made[-1]

    yield make
    for run in made:
        if run.supervisor is not None and run.supervisor.poll() is None:
            run.kill_all()
