"""A small run whose processes can be killed, what must hold of it after any fault, and machines."""

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cluster.inspect.verify import audit
from cluster.plan.stream import stream_order, stream_plan
from cluster.settings.file import save_config
from cluster.settings.hydra import compose
from cluster.state.identity import identity_of
from cluster.trainer.job import TrainJob
from distill.checkpoint.manifest import read_manifest, step_name
from distill.data.generate import generate_shard
from distill.data.layout import stored_dtype
from distill.data.shards import read_shard, write_shard
from distill.data.sidecar import shard_spec
from distill.data.stores.store import read_sidecar
from distill.run.files import RunDir, read_lines
from distill.run.identity import hash_of
from distill.run.measured import last_step
from distill.teachers.build import build_teacher
from distill.testing import run_ranks

DRIVER = Path(__file__).parent / "driver.py"
RAY = str(Path(sys.executable).with_name("ray"))
DEADLINE_S = 240.0
START_TRIES = 3  # a raylet gives up after 15 s beside other work


class Chaos:
    """A run of two teacher workers and one trainer rank on a closed-form teacher."""

    def __init__(self, folder, undisturbed, *overrides):
        self.folder, self.run = folder, RunDir(folder / "run")
        self._undisturbed = undisturbed
        for name in ("beats", "doom", "struck", "run"):
            (folder / name).mkdir(exist_ok=True)
        (self.config,) = compose(
            [
                "experiment=tiny",
                f"run.dir={self.run.root}",
                "data.num_classes=0",
                "~teacher",
                "+teacher={mixture: {kind: analytic, path: "
                + str(undisturbed.teacher)
                + ", steps: 8}}",
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

    def command(self, verb="run"):
        """The command line that works on the run."""
        return [sys.executable, str(DRIVER), verb, str(self.run.root)]

    def start(self, verb="run"):
        """Starts a supervisor."""
        with (self.folder / "log.txt").open("a") as log:
            self.supervisor = psutil.Popen(
                self.command(verb), stdout=log, stderr=log, start_new_session=True, env=self.env
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

    def recovery_s(self, shard, until):
        """Seconds from the death of the worker that made `shard` to its commit by another one.

        0 if the shard was there; a commit after `until` has another cause.
        """
        died = (self.folder / f"struck/{shard:08d}").stat().st_mtime
        times = [e["time"] for e in self.events("commit") if e["shard"] == shard]
        return next((time - died for time in times if died < time < until), 0.0)

    def check_waste(self, shards):
        """Velocity evaluations that are in no shard were those of so many shards at most; in words,
        how many.
        """
        beats = sum(path.stat().st_size for path in (self.folder / "beats").iterdir())
        kept = sum(read_sidecar(self.run, shard).nfe for shard in self.all_shards())
        wasted = beats * self.config.trajectory.batch_size - kept
        assert wasted <= shards * kept // len(self.all_shards())
        return f"wasted: {wasted} evaluations, {kept} kept"

    # -- The invariant

    def check(self):
        """Nothing lost, nothing twice, the same sequence, shards and weights as without a fault."""
        self.check_data()
        steps = self.config.train.max_steps
        assert checkpoint_hashes(self.run, steps) == checkpoint_hashes(self.alone, steps)

    def check_data(self):
        """All of it but the weights, whose last bits depend on the number of ranks."""
        report, steps = audit(self.run), self.config.train.max_steps
        assert report["ok"], report
        assert report["missing"] == [] and report["duplicate"] == []
        assert report["consumed_steps"] == steps
        assert self._consumed() == self._planned()
        alone = self.alone
        for shard in self.all_shards():
            assert read_sidecar(self.run, shard).sha256 == read_sidecar(alone, shard).sha256

    @property
    def alone(self):
        """The same run without a fault."""
        return self._undisturbed.run(self.config)

    def read(self, run, shard):
        """Sidecar and states of a shard of this run or of `alone`."""
        spec = spec_of(self.config)
        count = spec.samples_per_shard
        states = np.empty((count, *spec.sample_shape), dtype=stored_dtype(spec))
        return read_shard(run, spec, shard, states, np.empty(count, dtype=np.int64)), states

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


# -----------------------------------------------------------------------------------------------
# The same run without a fault: one process makes all shards, then one trains on them


class Undisturbed:
    """Runs without a fault, and without pool, Ray and coordinator; each is made once."""

    def __init__(self, folder):
        self._folder, self._known = folder, {}
        self.teacher = folder / "mixture.json"
        mixture = {"shape": [1, 8, 8], "means": [[-0.5] * 64, [0.5] * 64], "stds": [0.2, 0.1]}
        self.teacher.write_text(json.dumps(mixture))

    def run(self, config):
        """The finished run of these settings.

        Its last checkpoint holds weights, moments and averages, so equal hashes are equal states,
        bit for bit. That needs the same torch on the same kind of CPU, and the same ranks and
        micro-batch.
        """
        key = hash_of(identity_of(config)), config.train.max_steps
        if key not in self._known:
            self._known[key] = self._make(config, self._folder / str(len(self._known)))
        return self._known[key]

    def _make(self, config, folder):
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
        spec = spec_of(config)
        teachers = {name: build_teacher(t, "cpu") for name, t in config.teacher.items()}
        for shard in range(stream_plan(config).shards):
            made = generate_shard(
                teachers, config.teacher, config.trajectory, config.seed, shard, "cpu"
            )
            write_shard(config.files, spec, shard, made, 0.0, "test")
        job = TrainJob("train", config, spec, folder / "scratch", "hash")
        assert run_ranks(train_alone, 1, folder / "rank", job) == [config.train.max_steps]
        return config.files


def spec_of(config):
    """What the shards of a run are."""
    prints = {n: build_teacher(t, "cpu").fingerprint for n, t in config.teacher.items()}
    return shard_spec(config.seed, config.data.image, config.trajectory, config.teacher, prints)


def train_alone(rank, world_size, job):
    """The whole training in this process."""
    from cluster.trainer.rank import run_rank  # it imports DeepSpeed

    return run_rank(job, torch.device("cpu"), lambda: False)


def checkpoint_hashes(run, step):
    """sha256 of every file of a checkpoint by name."""
    files = read_manifest(run.checkpoints / step_name(step)).files
    return {name: entry.sha256 for name, entry in files.items()}


# -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The runs without a fault."""
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def chaos(tmp_path, undisturbed):
    """Makes runs; whatever they have started ends with the test."""
    made = []

    def make(*overrides):
        made.append(Chaos(tmp_path, undisturbed, *overrides))
        return made[-1]

    yield make
    for run in made:
        if run.supervisor is not None and run.supervisor.poll() is None:
            run.kill_all()


# -----------------------------------------------------------------------------------------------
# Machines of a Ray cluster


class Node:
    """One `ray start --block`, in a session of its own."""

    def __init__(self, folder, name, env, *arguments, gpus=0, **resources):
        self.log = folder / f"{name}.txt"
        command = [RAY, "start", "--block", "--object-store-memory=100000000"]
        command += [f"--num-cpus={sum(resources.values())}", f"--num-gpus={gpus}"]
        command += [f"--resources={json.dumps(resources)}"]
        for _ in range(START_TRIES):
            with self.log.open("w") as log:
                self.process = psutil.Popen(
                    [*command, *arguments], stdout=log, stderr=log, env=env, start_new_session=True
                )
            deadline = time.monotonic() + 120
            while self.process.poll() is None and time.monotonic() < deadline:
                if "Ray runtime started" in self.log.read_text():
                    return
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    @property
    def address(self):
        """Where other nodes join the head."""
        return self.log.read_text().split("ray start --address='")[1].split("'")[0]

    def kill(self):
        """kill -9 of all its processes at once, as when a machine is gone."""
        everyone = [*self.process.children(recursive=True), self.process]
        for process in everyone:
            process.suspend()
        for process in everyone:
            process.kill()
        self.process.wait()


@pytest.fixture
def nodes(tmp_path):
    """Starts nodes of one cluster; the first is its head."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    env = os.environ | {
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    started = []
    short = tempfile.mkdtemp(prefix="r")  # socket paths have a limit

    def start(**resources):
        if started:
            arguments = [f"--address={started[0].address}"]
        else:
            arguments = ["--head", "--port=0", "--include-dashboard=false", f"--temp-dir={short}"]
        node = Node(tmp_path, f"node{len(started)}", env, *arguments, **resources)
        started.append(node)
        return node

    start.env, start.ray = env, RAY
    yield start
    for node in reversed(started):
        if node.process.poll() is None:
            node.kill()
    shutil.rmtree(short)
