"""A real Slurm of four nodes on this machine, and runs submitted to it.

`minislurm.sh` starts it in its own folder: with nodes that have their own network, processes and
host name where this user may make namespaces, else as plain daemons. Missing packages are installed
where that needs no password (MINISLURM_INSTALL=0: never). Without them the tests are skipped, and
say what was not tested.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.compose import compose
from cluster.consumption import planned_sha256
from cluster.job import stream_order
from cluster.jobs import read_ids, read_jobs
from cluster.progress import last_step
from cluster.verify import audit
from distill.rundir import RunDir, read_lines

MINI = Path(__file__).with_name("minislurm.sh")
BOWSTRING = [sys.executable, "-m", "cluster.cli"]
DEADLINE_S = 300.0
# Jobs here are preempted by those in partition `high`, 30 s after they were told.
SPOT = "PartitionName=spot Nodes=ALL PriorityTier=0 GraceTime=30 State=UP"


class Cluster:
    """The test cluster."""

    def __init__(self, folder):
        self.folder = folder

    def mini(self, verb, *arguments):
        """Runs a verb of minislurm.sh; what it prints."""
        command = [str(MINI), verb, str(self.folder), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A cluster of four nodes with four pretended cores each."""
    install = subprocess.run([MINI, "install"], stderr=subprocess.PIPE, text=True)
    if install.returncode:
        pytest.skip(f"NOT TESTED, the Slurm jobs of a run: {install.stderr.strip()}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISLURM_EXTRA", SPOT)
        patch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
        try:
            for line in cluster.mini("start").splitlines():
                name, _, value = line.removeprefix("export ").partition("=")
                patch.setenv(name, value)
            yield cluster
        finally:
            cluster.mini("stop")


class Case:
    """A submitted run of one trainer rank and one teacher worker per node."""

    def __init__(self, cluster, folder, *settings):
        self.cluster, self.folder = cluster, folder
        mixture = {"shape": [1, 8, 8], "means": [[-0.5] * 64, [0.5] * 64], "stds": [0.2, 0.1]}
        (folder / "mixture.json").write_text(json.dumps(mixture))
        teacher = "{kind: analytic, path: " + str(folder / "mixture.json") + ", steps: 8}"
        # Nodes with namespaces have this folder each for themselves.
        scratch = "/tmp/ray" if os.environ["MINISLURM_MODE"] == "netns" else "/tmp"
        self.settings = [
            "experiment=tiny",
            f"run.dir={folder / 'run'}",
            "~teacher",
            "+teacher={mixture: " + teacher + "}",
            "train.save_every=5",
            "trajectory.wait_timeout_s=300",
            "cluster=slurm",
            f"cluster.slurm.scratch={scratch}",
            "cluster.slurm.patience_s=240",
            "cluster.slurm.train.time='10:00'",
            "cluster.slurm.teachers.time='10:00'",
            "cluster.slurm.teachers.max_nodes=4",
            *settings,
        ]
        (self.config,) = compose(self.settings)
        self.run = RunDir(folder / "run")
        # Ray makes its workers nice, and beside other work they would starve.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "PATH": path}

    def bowstring(self, *arguments):
        """Runs the command line; what it printed."""
        done = subprocess.run(
            [*BOWSTRING, *arguments], capture_output=True, text=True, env=self.env, cwd=self.folder
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self):
        """Submits the run; what was printed."""
        return self.bowstring("submit", *self.settings)

    def jobs(self, kind):
        """Jobs or tasks of a kind, as Slurm tells."""
        return [job for job in read_jobs(self.run) if job.kind == kind]

    @property
    def train(self):
        """The trainer's job."""
        (job,) = self.jobs("train")
        return job

    def tell(self, *command):
        """Runs a command of Slurm."""
        subprocess.run(command, check=True, capture_output=True)

    @property
    def logs(self):
        """What the jobs said, for the message of a failed test."""
        files = sorted((self.run.slurm / "logs").iterdir()) if self.run.slurm.exists() else []
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def said(self, words, kind="train"):
        """How often the jobs of a kind said something."""
        logs = (self.run.slurm / "logs").glob(f"{kind}-*.log")
        return sum(path.read_text().count(words) for path in logs)

    def until(self, condition, *fatal):
        """Waits; a trainer's job in one of the states `fatal` is a failure."""
        deadline = time.monotonic() + DEADLINE_S
        next_look_s = 0.0
        while not condition():
            assert time.monotonic() < deadline, f"{read_jobs(self.run)}\n{self.logs}"
            if time.monotonic() > next_look_s:
                next_look_s = time.monotonic() + 2
                assert self.train.state not in fatal, f"{self.train}\n{self.logs}"
            time.sleep(0.1)

    def until_step(self, step):
        """Waits for the training."""
        self.until(lambda: last_step(self.run.metrics) >= step, "FAILED", "CANCELLED", "TIMEOUT")

    def finish(self):
        """Waits for the end of the trainer's job, which must be a good one."""
        self.until(lambda: self.train.state == "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def events(self, kind):
        """Events of one kind."""
        return [event for event in read_lines(self.run.events) if event["kind"] == kind]

    def next_step_s(self, since):
        """Seconds from `since` to the next step that was logged."""
        return min(e["time"] - since for e in self.events("steps") if e["time"] > since)

    def check(self):
        """Nothing lost, nothing twice, and the trainer took the planned sequence."""
        report = audit(self.run)
        assert report["ok"], report
        assert report["missing"] == [] and report["duplicate"] == []
        assert report["consumed_steps"] == self.config.train.max_steps
        planned = planned_sha256(stream_order(self.config), 0, self.config.train.max_steps)
        assert report["consumed_sha256"] == planned

    def close(self):
        """Ends what is left of the run."""
        for job in read_ids(self.run).values():
            subprocess.run(["scancel", job], capture_output=True)


@pytest.fixture
def submitted(slurm, tmp_path):
    """Makes runs on the cluster; their jobs end with the test."""
    made = []

    def make(*settings):
        made.append(Case(slurm, tmp_path, *settings))
        return made[-1]

    yield make
    for case in made:
        case.close()
