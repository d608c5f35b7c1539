"""A real Slurm of four nodes on this machine, and runs submitted to it: for tests/slurm and for
benchmarks/slurm.py.

`minislurm.sh` starts it in its own folder: with nodes that have their own network, processes and
host name where this user may make namespaces, else as plain daemons.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.inspect.verify import audit, planned_sha256
from cluster.plan.stream import stream_order
from cluster.settings.hydra import compose
from cluster.slurm.jobs import Job, read_ids, read_jobs
from distill.run.files import RunDir, read_lines
from distill.run.measured import last_step

TESTS = Path(__file__).resolve().parents[2] / "tests" / "slurm"
MINI = TESTS / "minislurm.sh"
BOWSTRING = [sys.executable, "-m", "cluster.cli.main"]
DEADLINE_S = 600.0
# Jobs here are preempted by those in partition `high`, 30 s after they were told.
SPOT = "PartitionName=spot Nodes=ALL PriorityTier=0 GraceTime=30 State=UP"
BAD_ENDS = ("FAILED", "CANCELLED", "TIMEOUT")


class Cluster:
    """The test cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mini(self, verb: str, *arguments: str) -> str:
        """Runs a verb of minislurm.sh; what it prints."""
        command = [str(MINI), verb, str(self.folder), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout

    @contextmanager
    def started(self) -> Iterator[None]:
        """Starts it, sets what Slurm's commands need in this process, and stops it in the end."""
        before = os.environ.copy()
        os.environ["MINISLURM_EXTRA"] = SPOT
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        try:
            for line in self.mini("start").splitlines():
                name, _, value = line.removeprefix("export ").partition("=")
                os.environ[name] = value
            yield
        finally:
            self.mini("stop")
            os.environ.clear()
            os.environ.update(before)

    @property
    def has_cables(self) -> bool:
        """Whether its nodes have a network that can be cut."""
        return os.environ["MINISLURM_MODE"] == "netns"

    def cut(self, node: str, seconds: float) -> None:
        """Cuts the cable of a node for so long."""
        self.mini("link-down", node)
        try:
            time.sleep(seconds)
        finally:
            self.mini("link-up", node)

    def preempt(self, nodes: list[str], seconds: float) -> None:
        """Submits a job that takes whole nodes, from jobs in partition `spot`, for so long."""
        size = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive"]
        job = ["--output=/dev/null", f"--wrap=sleep {seconds:g}"]
        tell("sbatch", "--partition=high", *size, *job)


def tell(*command: str) -> None:
    """Runs a command of Slurm."""
    subprocess.run(command, check=True, capture_output=True)


def hosts(node_list: str) -> list[str]:
    """Names of nodes, written apart: node[1-2] is node1 and node2."""
    if not node_list:
        return []
    command = ["scontrol", "show", "hostnames", node_list]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


class Case:
    """A submitted run of one trainer rank and one teacher worker per node.

    With a `mood`, a seed, commands and jobs of the run meet a Slurm that often does not answer, or
    answers oddly (`moody.sh`).
    """

    def __init__(self, cluster: Cluster, folder: Path, *settings: str, mood: str = "") -> None:
        self.cluster, self.folder = cluster, folder
        mixture = {"shape": [1, 8, 8], "means": [[-0.5] * 64, [0.5] * 64], "stds": [0.2, 0.1]}
        (folder / "mixture.json").write_text(json.dumps(mixture))
        teacher = "{kind: analytic, path: " + str(folder / "mixture.json") + ", steps: 8}"
        # Nodes with namespaces have this folder each for themselves.
        scratch = "/tmp/ray" if cluster.has_cables else "/tmp"
        self.settings = [
            "experiment=tiny",
            f"run.dir={folder / 'run'}",
            "data.num_classes=0",
            "~teacher",
            "+teacher={mixture: " + teacher + "}",
            "train.save_every=5",
            "trajectory.wait_timeout_s=300",
            *([] if any(word.startswith("cluster=") for word in settings) else ["cluster=slurm"]),
            "cluster.trainer.num_workers=1",
            "cluster.teachers.num_workers=1",
            "cluster.slurm.teachers.workers_per_node=1",
            "cluster.slurm.teachers.nodes=2",
            f"cluster.slurm.scratch={scratch}",
            "cluster.slurm.patience_s=240",
            "cluster.slurm.train.time='30:00'",
            "cluster.slurm.teachers.time='30:00'",
            "cluster.slurm.teachers.max_nodes=4",
            *settings,
        ]
        (self.config,) = compose(self.settings)
        self.run = RunDir(folder / "run")
        # Ray makes its workers nice, and beside other work they would starve.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        if mood:
            subprocess.run([TESTS / "moody.sh", mood, folder / "moody"], check=True)
            path = f"{folder / 'moody'}:{path}"
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "PATH": path}
        self._dark: list[str] = []
        self._closed: list[str] = []

    # -------------------------------------------------------------------------------------------
    # What is done to it

    def bowstring(self, *arguments: str) -> str:
        """Runs the command line; what it printed."""
        done = subprocess.run(
            [*BOWSTRING, *arguments], capture_output=True, text=True, env=self.env, cwd=self.folder
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *flags: str) -> str:
        """Submits the run; what was printed."""
        return self.bowstring("submit", *self.settings, *flags)

    def tell(self, *command: str) -> None:
        """Runs a command of Slurm."""
        tell(*command)

    def power_off(self, node: str) -> None:
        """Takes a node's power away, until `power_on` or `close`."""
        self.cluster.mini("node-kill", node)
        self._dark.append(node)

    def power_on(self) -> None:
        """Gives all nodes their power back."""
        while self._dark:
            self.cluster.mini("node-start", self._dark.pop())

    def leave_only(self, nodes: list[str]) -> None:
        """Has Slurm start nothing on other nodes, until `close`."""
        everywhere = ["sinfo", "--noheader", "--Node", "--format=%N"]
        names = subprocess.run(everywhere, check=True, capture_output=True, text=True).stdout
        for node in sorted({*names.split()} - {*nodes}):
            tell("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
            self._closed.append(node)

    def close(self) -> None:
        """Ends what is left of the run; nodes are as before."""
        while self._closed:
            tell("scontrol", "update", f"NodeName={self._closed.pop()}", "State=RESUME")
        for job in read_ids(self.run).values():
            subprocess.run(["scancel", job], capture_output=True)
        self.power_on()

    # -------------------------------------------------------------------------------------------
    # What is seen of it

    def jobs(self, kind: str) -> list[Job]:
        """Jobs or tasks of a kind, as Slurm tells."""
        return [job for job in read_jobs(self.run) if job.kind == kind]

    @property
    def train(self) -> Job:
        """The trainer's job."""
        (job,) = self.jobs("train")
        return job

    @property
    def teacher_nodes(self) -> list[str]:
        """Nodes on which tasks of the teachers run."""
        tasks = [task for task in self.jobs("teachers") if task.state == "RUNNING"]
        return sorted({task.node_list for task in tasks})

    @property
    def logs(self) -> str:
        """What the jobs said, for the message of a failed test."""
        files = sorted((self.run.slurm / "logs").iterdir()) if self.run.slurm.exists() else []
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def said(self, words: str, kind: str = "train") -> int:
        """How often the jobs of a kind said something."""
        logs = (self.run.slurm / "logs").glob(f"{kind}-*.log")
        return sum(path.read_text().count(words) for path in logs)

    def events(self, kind: str, since: float = 0.0) -> list[dict[str, Any]]:
        """Events of one kind."""
        found = read_lines(self.run.events)
        return [event for event in found if event["kind"] == kind and event["time"] > since]

    def step_times(self, since: float = 0.0) -> list[float]:
        """When steps were logged."""
        times = [record["time"] for record in read_lines(self.run.metrics)]
        return [time for time in times if time > since]

    def pause_s(self, since: float) -> float:
        """Longest time without a step after `since`."""
        return max(after - before for before, after in pairwise([since, *self.step_times(since)]))

    # -------------------------------------------------------------------------------------------
    # What is waited for, and what must hold

    def until(self, condition: Callable[[], bool], *fatal: str) -> None:
        """Waits; a trainer's job in one of the states `fatal` is a failure."""
        deadline = time.monotonic() + DEADLINE_S
        next_look_s = 0.0
        while not condition():
            assert time.monotonic() < deadline, f"{read_jobs(self.run)}\n{self.logs}"
            if fatal and time.monotonic() > next_look_s:
                next_look_s = time.monotonic() + 2
                assert self.train.state not in fatal, f"{self.train}\n{self.logs}"
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        """Waits for the training."""
        self.until(lambda: last_step(self.run.metrics) >= step, *BAD_ENDS)

    def until_resumed(self, times: int) -> None:
        """Waits until a training has begun so often."""
        self.until(lambda: len(self.events("resume")) == times, *BAD_ENDS)

    def finish(self) -> None:
        """Waits for the end of the trainer's job, which must be a good one."""
        self.until(lambda: self.train.state == "COMPLETED", *BAD_ENDS)

    def check(self) -> None:
        """Nothing lost, nothing twice, and the trainer took the planned sequence."""
        report = audit(self.run)
        assert report["ok"], report
        assert report["missing"] == [] and report["duplicate"] == []
        assert report["consumed_steps"] == self.config.train.max_steps
        planned = planned_sha256(stream_order(self.config), 0, self.config.train.max_steps)
        assert report["consumed_sha256"] == planned
