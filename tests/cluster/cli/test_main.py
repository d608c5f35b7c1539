"""Command line: exit codes, a sentence per mistake, completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main as cli
from cluster.cli.arguments import USAGE_ERROR, open_run, read_settings, setting_words
from cluster.cli.main import VERBS
from cluster.settings.file import load_config, save_config
from cluster.settings.hydra import compose
from cluster.settings.schema import RunConfig
from distill.config import ConfigError
from distill.run.files import RunDir
from distill.testing import tiny_spec, write_tiny_record, write_tiny_shards


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bowstring(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=150,  # a launcher's jobs import torch
        env={**os.environ, **environment},
    )


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after `code`."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(result.stdout.splitlines()[-1].split())


def test_estimate_status_and_submit_need_no_torch():
    save_config(RunDir(Path("runs/tiny")), compose(["experiment=tiny"])[0])
    loaded = modules_after(
        "from cluster.cli.main import dispatch\n"
        "assert dispatch(['estimate', 'experiment=fashion']) == 0\n"
        "assert dispatch(['estimate', 'runs/tiny', 'train.max_steps=9', '--json']) == 0\n"
        "assert dispatch(['status', 'runs/tiny', '--json']) == 0\n"
        "assert dispatch(['submit', 'experiment=tiny', 'cluster=slurm', '--dry-run']) == 0"
    )
    assert loaded.isdisjoint({"torch", "ray", "deepspeed"})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["frobnicate"], "there is no verb frobnicate; choose one of: run, pretrain"),
        (["evalute", "runs/x"], "there is no verb evalute; did you mean evaluate?"),
        (["run"], "which experiment"),
        (["run", "experiment=tiny", "train.max_step=3"], "did you mean train.max_steps"),
        (["run", "experiment=tiny", "--force-new"], "--force-new: expected one argument"),
        (["run", "experiment=tiny", "--force-new", "seed=1"], "'seed=1' is no name for a new run"),
        (["run", "--no-evalution", "experiment=tiny"], "the nearest is --no-evaluation; see"),
        (["run", "experiment=tiny", "--multirn"], "there is no flag --multirn; the nearest is --m"),
        (["run", "experiment=tiny", "--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["sample", "runs/none", "--nef=2"], "there is no flag --nef; the nearest is --nfe"),
        (["status", "runs/none", "runs/other"], "runs/other is not understood; see"),
        (["run", "runs/none", "--flag"], "there is no flag --flag; see bowstring run --help"),
        (["run", "runs/none"], "there is no run at runs/none"),
        (["status", "runs/none"], "there is no run at runs/none"),
        (["status"], "see bowstring status --help"),
        (["sample", "runs/none", "--labels", "one"], "'one' is not a list"),
        (["submit", "experiment=tiny"], "name no Slurm cluster; add cluster=slurm"),
        (["submit", "experiment=tiny", "cluster=slurm", "cluster.address=a:1"], "address=auto"),
        (["submit", "experiment=tiny", "cluster=slurm", "cluster.slurm.train.time=90"], "90:00"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(args, message):
    result = bowstring(*args)
    assert result.returncode == USAGE_ERROR
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_missing_run_lists_those_that_exist():
    save_config(RunDir(Path("runs/tiny")), compose(["experiment=tiny"])[0])
    with pytest.raises(ConfigError, match="there are: runs/tiny"):
        open_run("runs/tini")


def configurations(verb: str, *args: str) -> list[RunConfig]:
    return read_settings(setting_words(VERBS[verb].read(args)))


def test_force_new_names_another_run():
    (config,) = configurations("run", "experiment=tiny", "--force-new", "second")
    assert config.run.dir == "runs/second"
    save_config(RunDir(Path("runs/second")), config)
    (config,) = configurations("run", "--force-new=third", "runs/second", "seed=4")
    assert (config.run.dir, config.seed) == ("runs/third", 4)


def test_a_job_of_a_sweep_is_a_run_like_others():
    """Its folder has a key=value in its name."""
    sweep = configurations("train", "experiment=tiny", "seed=0,1", "-m", "train.max_steps=9")
    assert [config.run.dir for config in sweep] == ["runs/tiny-seed=0", "runs/tiny-seed=1"]
    save_config(RunDir(Path("runs/tiny-seed=1")), sweep[1])
    (config,) = configurations("train", "runs/tiny-seed=1", "train.max_steps=10")
    assert (config.seed, config.train.max_steps) == (1, 10)


LAUNCHER = "hydra/launcher=submitit_local"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["submit", "--multirun", "experiment=tiny", LAUNCHER], "asks Slurm itself"),
        (["estimate", "experiment=tiny", LAUNCHER], "a launcher is for the jobs of"),
        (["run", "experiment=tiny", LAUNCHER], "add --multirun"),
        (["run", "-m", "experiment=tiny", "hydra/launcher=no"], "hydra/launcher/no.*submitit"),
        (
            ["run", "-m", "experiment=tiny", LAUNCHER, "train.max_step=1"],
            "no setting train.max_ste",
        ),
        (["run", "-m", "experiment=tiny", LAUNCHER, "hydra.launcher.time=1"], "time"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused_in_one_sentence(args, message):
    with pytest.raises(ConfigError, match=message):
        cli.dispatch(args)
    assert list(Path().glob("runs/*/*")) == []


def test_what_is_wrong_in_a_job_of_a_launcher_is_said_by_the_one_that_waits(in_empty_folder):
    """Two processes of submitit's, each with the settings of its job; the second fails too."""
    settings = ["experiment=tiny", "seed=0,1", "teacher.pretrained.path=nowhere"]
    result = bowstring("train", "--multirun", *settings, LAUNCHER)
    assert result.returncode == USAGE_ERROR, result.stderr
    assert "error: " in result.stderr and "nowhere" in result.stderr
    for seed in (0, 1):
        run = RunDir(in_empty_folder / "runs" / f"tiny-seed={seed}")
        assert load_config(run).seed == seed


def test_composed_settings_are_shown_not_run():
    result = bowstring("run", "experiment=tiny", "--cfg", "job", "--package", "train")
    assert result.returncode == 0
    assert "max_steps: 6" in result.stdout
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("bowstring ", {"run", "status", "doctor"}),
        ("bowstring run experiment=", {"experiment=digits", "experiment=tiny"}),
        ("bowstring run experiment=tiny objective=", {"objective=bezier", "objective=traflow"}),
        ("bowstring train experiment=tiny train.max", {"train.max_steps="}),
    ],
)
def test_completion(line, some):
    result = bowstring("-sc", "query=bash", COMP_LINE=line)
    offered = set(result.stdout.split())
    assert some <= offered
    assert not any("base_" in word for word in offered)


def test_completion_installs_for_bash():
    assert "hydra_bash_completion" in bowstring("run", "-sc", "install=bash").stdout


def test_labels_may_begin_with_none():
    options = VERBS["sample"].read(["r", "--labels", "-1,2", "--nfe", "2"])
    assert (options.run, options.labels, options.nfe) == ("r", [-1, 2], 2)


def test_trajectories_are_exported_for_fastgen(in_empty_folder):
    run = RunDir(in_empty_folder / "runs/tiny")
    write_tiny_record(run, {"data": {"num_classes": 10}})
    write_tiny_shards(run, tiny_spec(), [0])
    done = bowstring("export", "runs/tiny", "--format", "fastgen")
    assert (done.returncode, done.stdout) == (0, "runs/tiny/fastgen\n"), done.stderr
    assert (run.root / "fastgen/00000000.tar").exists()
    os.truncate(run.tar(0), 1000)
    bad = bowstring("export", "runs/tiny", "--format=fastgen", "--out", "other")
    assert bad.returncode == 1 and len(bad.stderr.splitlines()) == 1
    assert bad.stderr.startswith("error: runs/tiny/shards/00000000.tar: 1000 bytes instead of")
    wrong = bowstring("export", "runs/tiny", "--format", "zip")
    assert wrong.returncode == USAGE_ERROR and "'zip'" in wrong.stderr
    flag = bowstring("export", "runs/tiny", "--format=fastgen", "--overwrite")
    assert flag.returncode == USAGE_ERROR and "--overwrite, --dtype and --license" in flag.stderr


def test_an_export_replaces_nothing_unasked(in_empty_folder):
    run = RunDir(in_empty_folder / "runs/tiny")
    write_tiny_record(run, {"data": {"num_classes": 10}})
    (run.root / "student").mkdir()
    done = bowstring("export", "runs/tiny")
    assert done.returncode == USAGE_ERROR and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: runs/tiny/student is there already; replace it with --ov")
