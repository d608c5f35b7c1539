"""The Slurm jobs of a run as Slurm sees them. No torch, no ray.

    slurm/jobs.json   {"train": "1204", "teachers": "1205", "evaluate": "1206"}: ids of the last
                      submission; "train.2" and so on of a chain

Slurm is asked by its own commands, so this works wherever `squeue` does. A controller that is being
started again, or is overloaded, does not answer for a while: it is asked again, and what is not
known is not taken for "no". A site's own words between the lines of an answer are read over.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.config import ConfigError
from distill.run.files import RunDir, read_bytes
from distill.run.records import RecordError, parse_json

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
PATIENCE_S, PAUSE_S = 120.0, 3.0  # how long a command is tried again, and how often
# What Slurm says when the same command may succeed a little later.
PASSING = re.compile(
    r"unable to contact|timed out|connection (refused|reset|failure)|communication|zero bytes"
    r"|receive failure|temporarily unavailable|standby|not responding|did not answer|try again"
    r"|protocol authentication error|controller is not",
    re.IGNORECASE,
)
JOB_ID = re.compile(r"(\d+)(?:;\S*)?")  # as --parsable prints it, with the cluster's name
# What a job that gives its own commands must not hand on: they would be options of the new job.
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
CHOSEN = ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION")


class SlurmError(ChildProcessError):
    """Slurm refused, or does not answer. The message is its own."""

    @property
    def passes(self) -> bool:
        """Whether the same command may succeed later. It may also have been heard."""
        return PASSING.search(str(self)) is not None


def environment() -> dict[str, str]:
    """This process's environment without what Slurm has told a job of itself."""
    in_job = "SLURM_JOB_ID" in os.environ

    def goes(name: str) -> bool:
        if name.startswith("SBATCH_"):
            return in_job and name not in CHOSEN
        return name.startswith(("SLURM_", "SRUN_", "SALLOC_")) and name not in KEPT

    return {name: value for name, value in os.environ.items() if not goes(name)}


def ask(*command: str) -> str:
    """What a command of Slurm prints, which may be given more than once.

    Raises:
        ConfigError: there is no Slurm here.
        SlurmError: the command failed, or nobody answered for PATIENCE_S.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask_once(*command)
        except SlurmError as error:
            if not error.passes or time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE_S)


def ask_once(*command: str) -> str:
    """What a command of Slurm prints; raises as `ask`."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_S, env=environment()
        )
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


def kind_of(name: str) -> str:
    """Kind of a job of jobs.json."""
    return name.partition(".")[0]


def read_ids(run: RunDir) -> dict[str, str]:
    """Job ids of the last submission by kind, of a chain by kind and place; empty when there was
    none.

    Raises:
        ConfigError, SlurmError: as `ask`, which is needed where the file is damaged.
    """
    path = run.slurm / "jobs.json"
    try:
        found = parse_json(read_bytes(path))
    except FileNotFoundError:
        return {}
    except RecordError:
        found = None
    if isinstance(found, dict) and all(JOB_ID.fullmatch(str(job)) for job in found.values()):
        return {str(kind): str(job) for kind, job in found.items()}
    # Damaged, or of a version that took a site's greeting for an id. Slurm knows them too.
    try:
        return {
            f"{script.stem}.{n}" if n else script.stem: job
            for script, ids in _of_scripts(run)
            for n, job in enumerate(reversed(ids))  # the newest first: the others may have ended
        }
    except ConfigError as error:
        raise ConfigError(
            f"{path} is corrupt, and {error}; see `squeue --me` there for jobs that are left"
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
    for name, state, again, nodes, left, reason, where in _rows(lines, len(COLUMNS)):
        if kind := kinds.get(name.partition("_")[0]):
            found.append(
                Job(kind_of(kind), name, state, int(again), int(nodes), left, reason, where)
            )
    return found


def ids_of(script: Path) -> list[str]:
    """Ids of this user's jobs of a script that Slurm still knows of, in the order of submission."""
    lines = ask("squeue", "--me", "-h", "-t", "all", "-O", "JobArrayID:60|,Command:4000|")
    found = {
        name.partition("_")[0]
        for name, command in _rows(lines, 2)
        if f"{command} ".startswith(f"{script} ")  # with its arguments, or without
    }
    return sorted(found, key=int)


OUR_ERROR = re.compile(r"^(\S+ \S+ \w+: )?error: ")  # a script's, or the supervisor's
LOG_BYTES = 20_000  # of the end of a log, in which its error stands


def last_words(run: RunDir, ids: dict[str, str]) -> list[str]:
    """The last error in the newest log of each kind of job, and up to five lines behind it."""
    found = []
    for kind, job in ids.items():
        stem = "train" if kind_of(kind) == "train" else kind  # a chain has one script
        names = (f"logs/{stem}-{job}.log", f"logs/{stem}-{job}_*.log")
        logs = [path for name in names for path in run.slurm.glob(name)]
        for path in sorted(logs, key=lambda path: path.stat().st_mtime)[-1:]:
            lines = read_bytes(path)[-LOG_BYTES:].decode(errors="replace").splitlines()
            errors = [number for number, line in enumerate(lines) if OUR_ERROR.search(line)]
            found += [f"{kind} {job}: {line}" for line in lines[errors[-1] :][:6]] if errors else []
    return found


def _of_scripts(run: RunDir) -> Iterator[tuple[Path, list[str]]]:
    for script in sorted(run.slurm.glob("*.sbatch")):
        yield script, ids_of(script)


def _rows(lines: str, columns: int) -> Iterator[list[str]]:
    """The rows of an answer of squeue. Other lines are the site's."""
    for line in lines.splitlines():
        row = [part.strip() for part in line.split("|")]
        if len(row) == columns + 1 and re.match(r"\d+(_|$)", row[0]):
            yield row[:columns]


# -----------------------------------------------------------------------------------------------
# What is made


def submit(script: Path, *options_and_words: str) -> str:
    """Id of a job that Slurm has taken. One that it took without saying so is found in the queue.

    Raises:
        SlurmError: it refused, or nobody answered for PATIENCE_S.
    """
    *options, last = options_and_words
    before, deadline = set(ids_of(script)), time.monotonic() + PATIENCE_S
    while True:
        problem = None
        try:
            said = ask_once("sbatch", "--parsable", *options, str(script), last)
        except SlurmError as error:
            if not error.passes:
                raise
            problem = error
        else:
            for line in reversed(said.splitlines()):
                if found := JOB_ID.fullmatch(line.strip()):
                    return found[1]
            problem = SlurmError(f"sbatch names no job: {said}")
        if new := [job for job in ids_of(script) if job not in before]:
            return new[-1]
        if not problem.passes or time.monotonic() >= deadline:
            raise problem
        time.sleep(PAUSE_S)
