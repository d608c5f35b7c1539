"""The Slurm jobs of a run as Slurm sees them. No torch, no ray.

    slurm/jobs.json   {"train": "1204", "teachers": "1205", "evaluate": "1206"}: ids of the last
                      submission

Slurm is asked by its own commands, so this works wherever `squeue` does.
"""

import json
import subprocess
from dataclasses import dataclass

from distill.config import ConfigError
from distill.run.files import RunDir

COLUMNS = {
    "JobArrayID": 60,
    "State": 20,
    "RestartCnt": 8,
    "NumNodes": 8,
    "TimeLeft": 20,
    "Reason": 60,
    "NodeList": 400,
}
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
ANSWER_S = 60.0  # a controller under load takes its time


class SlurmError(ChildProcessError):
    """Slurm refused, or does not answer. The message is its own."""


def ask(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        ConfigError: there is no Slurm here.
        SlurmError: the command failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} is not here; this verb needs a node of the Slurm cluster "
            "(`bowstring submit --dry-run` does not)"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {ANSWER_S:g} s") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


# -----------------------------------------------------------------------------------------------
# What there is


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as Slurm tells.

    Attributes:
        kind: train, teachers or evaluate.
        id: as in "1204", "1205_3", or "1205_[4-15%2]" for tasks that wait.
        restarts: how often it was requeued.
        reason: why it waits.
    """

    kind: str
    id: str
    state: str
    restarts: int
    nodes: int
    time_left: str
    reason: str
    node_list: str

    @property
    def array(self) -> str:
        """Id without that of the task: what was submitted."""
        return self.id.partition("_")[0]

    @property
    def is_there(self) -> bool:
        """Whether it waits or runs."""
        return self.state not in ENDED


def read_ids(run: RunDir) -> dict[str, str]:
    """Job ids of the last submission by kind; empty when there was none."""
    try:
        return dict(json.loads((run.slurm / "jobs.json").read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{run.slurm / 'jobs.json'} is corrupt ({error}); see `squeue --me` for jobs that are "
            "left, then move the file away"
        ) from error


def read_jobs(run: RunDir) -> list[Job]:
    """The jobs of the last submission, those that Slurm still knows of.

    Raises:
        ConfigError, SlurmError: as `ask`.
    """
    ids = read_ids(run)
    if not ids:
        return []
    form = ",".join(f"{name}:{width}|" for name, width in COLUMNS.items())
    try:
        lines = ask("squeue", "-h", "-t", "all", "-j", ",".join(ids.values()), "-O", form)
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it forgets a job minutes after its end
            return []
        raise
    kinds = {value: kind for kind, value in ids.items()}
    found = []
    for line in lines.splitlines():
        name, state, again, nodes, left, reason, where = (s.strip() for s in line.split("|")[:7])
        kind = kinds[name.partition("_")[0]]
        found.append(Job(kind, name, state, int(again), int(nodes), left, reason, where))
    return found
