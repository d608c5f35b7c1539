"""What Slurm's commands say, and what is made of it: with stand-ins whose answers are chosen here.
`tests/slurm` has a real Slurm.
"""

import json
import os
import sys

import pytest

from cluster.slurm import jobs
from distill.config import ConfigError
from distill.run.files import RunDir

# A queue in a file. `moods.json` has for each command what its next calls do: "ok"; "lost", which
# is taken and not answered; "banner", with a site's greeting around; anything else is an error.
STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path

home = Path({home!r})
name, args = Path(sys.argv[0]).name, sys.argv[1:]
moods = json.loads((home / "moods.json").read_text())
mood = moods.get(name, []).pop(0) if moods.get(name) else "ok"
(home / "moods.json").write_text(json.dumps(moods))
queue = json.loads((home / "queue.json").read_text())
if mood not in ("ok", "lost", "banner"):
    sys.exit(name + ": error: " + mood)
if name == "sbatch":
    number = 1200 + len(queue)
    given = {{k: v for k, v in os.environ.items() if k.startswith(("SLURM_", "SBATCH_"))}}
    queue.append([str(number), args[-2], args, given])
    (home / "queue.json").write_text(json.dumps(queue))
    answer = str(number)
else:
    answer = "\\n".join(job + "_[0-3]|" + script + " " + w[-1] + "|" for job, script, w, _ in queue)
if mood == "lost":
    sys.exit(name + ": error: Batch job submission failed: Socket timed out on send/recv operation")
if mood == "banner":
    greeting = "Welcome to the machine\\n--> Verifying queue (1)...OK | all | is | well"
    answer = greeting + "\\n" + answer + "\\nbye"
print(answer)
"""


class StandIn:
    """Commands of Slurm on the PATH, and their queue."""

    def __init__(self, home):
        self.home = home
        (home / "queue.json").write_text("[]")
        self.moods()
        for name in ("sbatch", "squeue", "scontrol"):
            path = home / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(STAND_IN.format(python=sys.executable, home=str(home)))
            path.chmod(0o755)

    def moods(self, **moods):
        """What the next calls of each command do."""
        (self.home / "moods.json").write_text(json.dumps(moods))

    @property
    def queue(self):
        return json.loads((self.home / "queue.json").read_text())


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    home = tmp_path / "site"
    home.mkdir()
    monkeypatch.setenv("PATH", str(home / "bin"), prepend=":")
    monkeypatch.setattr(jobs, "PAUSE_S", 0.0)
    return StandIn(home)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.slurm.mkdir(parents=True)
    for kind in ("train", "teachers"):
        (run.slurm / f"{kind}.sbatch").write_text("#!/bin/bash\n")
    return run


AWAY = "Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize("says", [AWAY, "slurm_load_jobs error: Socket timed out on send/recv"])
def test_a_controller_that_is_away_for_a_while_is_asked_again(slurm, run, says):
    slurm.moods(squeue=[says] * 4)
    assert jobs.ids_of(run.slurm / "train.sbatch") == []
    slurm.moods(squeue=["Invalid job id specified", "ok"])
    with pytest.raises(jobs.SlurmError, match="Invalid job id"):
        jobs.ask("squeue")


def test_a_controller_that_stays_away_is_given_up_with_its_own_words(slurm, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.3)
    slurm.moods(scontrol=[AWAY] * 1000)
    with pytest.raises(jobs.SlurmError, match="Unable to contact"):
        jobs.ask("scontrol", "show", "config")


@pytest.mark.parametrize("mood", ["ok", "banner", "lost"])
def test_a_job_is_submitted_once_whatever_sbatch_says(slurm, run, mood):
    """An answer that is lost leaves a job all the same; it is found in the queue by its script."""
    script = run.slurm / "train.sbatch"
    slurm.moods(sbatch=[mood], squeue=["banner"] * 5)
    assert jobs.submit(script, "--hold", str(run.root)) == "1200"
    assert jobs.submit(run.slurm / "teachers.sbatch", str(run.root)) == "1201"
    assert [job[:2] for job in slurm.queue] == [
        ["1200", str(script)],
        ["1201", str(run.slurm / "teachers.sbatch")],
    ]
    assert slurm.queue[0][2] == ["--parsable", "--hold", str(script), str(run.root)]


def test_a_submission_that_was_not_heard_is_made_again_and_a_refusal_is_not(slurm, run):
    script = run.slurm / "train.sbatch"
    slurm.moods(sbatch=[AWAY, AWAY])
    assert jobs.submit(script, str(run.root)) == "1200" and len(slurm.queue) == 1
    slurm.moods(sbatch=["Invalid account or account/partition combination specified", "ok"])
    with pytest.raises(jobs.SlurmError, match="Invalid account"):
        jobs.submit(script, str(run.root))
    assert len(slurm.queue) == 1


@pytest.mark.parametrize(
    "content",
    ['{"train": "12', "[]", "null", '{"train": "Welcome to the machine\\n1200"}', "[" * 100_000],
)
def test_damaged_ids_are_read_from_the_queue(slurm, run, content):
    for kind in ("train", "teachers"):
        jobs.submit(run.slurm / f"{kind}.sbatch", str(run.root))
    (run.slurm / "jobs.json").write_text(content)
    assert jobs.read_ids(run) == {"train": "1200", "teachers": "1201"}


def test_job_ids_that_cannot_be_read_are_not_taken_for_none(run, monkeypatch, tmp_path):
    assert jobs.read_ids(run) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    (run.slurm / "jobs.json").write_text('{"train": "12')
    with pytest.raises(ConfigError, match="is corrupt, and squeue is not here"):
        jobs.read_ids(run)
    (run.slurm / "jobs.json").write_text('{"train": "12"}')
    assert jobs.read_ids(run) == {"train": "12"}


@pytest.mark.parametrize("in_job", [False, True])
def test_a_job_does_not_hand_its_own_numbers_on(slurm, run, monkeypatch, in_job):
    """In an interactive job, or where it has left its variables behind."""
    for name in ("SLURM_MEM_PER_CPU", "SLURM_NTASKS", "SBATCH_MEM_PER_CPU", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    if in_job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    jobs.submit(run.slurm / "train.sbatch", str(run.root))
    ((_, _, _, given),) = slurm.queue
    kept = {"SLURM_CONF", "SBATCH_ACCOUNT"}
    assert given.keys() == (kept if in_job else kept | {"SBATCH_MEM_PER_CPU"})


def test_the_last_error_of_each_job_is_read_from_its_log(tmp_path):
    run = RunDir(tmp_path)
    logs = run.slurm / "logs"
    logs.mkdir(parents=True)
    (logs / "train-7.log").write_text(
        "fine\nerror: one\n1 Dec train: error: two\nslurmstepd-node1: error: requeue\n"
    )
    (logs / "teachers-8_0.log").write_bytes(b"\xff" * 99999 + b"\nerror: ray\n" + b"line\n" * 9)
    (logs / "teachers-80_0.log").write_text("error: of another job\n")
    os.utime(logs / "teachers-80_0.log", (2e9, 2e9))
    (logs / "evaluate-9.log").write_text("all is well\n")
    said = jobs.last_words(run, {"train": "7", "teachers": "8", "evaluate": "9"})
    assert said[:2] == [
        "train 7: 1 Dec train: error: two",
        "train 7: slurmstepd-node1: error: requeue",
    ]
    assert said[2:] == ["teachers 8: error: ray"] + ["teachers 8: line"] * 5
    (logs / "train-12.log").write_text("error: of the second of a chain\n")
    said = jobs.last_words(run, {"train": "11", "train.2": "12"})
    assert said == ["train.2 12: error: of the second of a chain"]
