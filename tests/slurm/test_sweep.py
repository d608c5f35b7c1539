"""A sweep through Hydra's submitit launcher: every run is a Slurm job of its own."""

import json
import subprocess

import pytest

from benchmarks.slurm.cluster import BOWSTRING, hosts
from cluster.inspect.verify import audit
from cluster.settings.file import load_config
from distill.run.files import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]


def queue():
    """Jobs of submitit that Slurm knows of: state and node of each."""
    asked = ["squeue", "-h", "-t", "all", "-n", "sweep", "-O", "State,NodeList"]
    lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    return [tuple(line.split()) for line in lines]


def test_the_runs_of_a_sweep_are_jobs_and_end_whole(submitted):
    """The one that waits for them ends when they have ended. Given again, nothing is left to do."""
    case = submitted()
    teacher = [word for word in case.settings if "teacher" in word and "slurm" not in word]
    sweep = ["--multirun", "experiment=tiny", *teacher, "seed=0,1"]
    launcher = [
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.name=sweep",
        "hydra.launcher.timeout_min=10",
        "hydra.launcher.cpus_per_task=3",
    ]
    case.bowstring("run", *sweep, *launcher)
    case.until(lambda: [state for state, _ in queue()] == ["COMPLETED"] * 2)
    assert all(hosts(node) for _, node in queue())
    for seed in (0, 1):
        run = RunDir(case.folder / "runs" / f"tiny-seed={seed}")
        report = audit(run)
        assert report["ok"] and report["consumed_steps"] == load_config(run).train.max_steps
        assert load_config(run).seed == seed
        assert run.report.exists() and json.loads(run.results.read_text())["step"] == 6
    assert case.bowstring("run", *sweep).count("nothing left to do") == 2


def test_a_run_that_fails_in_its_job_fails_the_sweep(submitted):
    case = submitted()
    command = ["train", "--multirun", "experiment=tiny", "seed=0,1"]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10"]
    done = subprocess.run(
        [*BOWSTRING, *command, "teacher.pretrained.path=nowhere", *launcher],
        capture_output=True,
        text=True,
        env=case.env,
        cwd=case.folder,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "nowhere" in said[0], done.stderr
