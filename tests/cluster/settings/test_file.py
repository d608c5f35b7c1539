"""config.yaml holds a run's settings exactly, follows a moved run, refuses what cannot change."""

from pathlib import Path

import pytest

from cluster.settings.file import load_config, save_config
from cluster.settings.hydra import compose
from distill.config import ConfigError
from distill.run.dir import RunDir


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (config,) = compose(["experiment=tiny", "teacher=early_late", "student=unet", "train.lr=3e-4"])
    run = RunDir(Path(config.run.dir))
    save_config(run, config)
    return run, config


def test_what_is_saved_is_what_is_loaded(saved):
    run, config = saved
    assert load_config(run) == config


def test_overrides_are_merged_on_top_and_checked(saved):
    run, _ = saved
    config = load_config(run, ["train.max_steps=9", "teacher.late.guidance=2", "eval.nfe=[1,4]"])
    assert (config.train.max_steps, config.teacher["late"].guidance) == (9, 2.0)
    assert config.eval.nfe == [1, 4]
    with pytest.raises(
        ConfigError, match=r"no setting train.max_step; did you mean train.max_steps"
    ):
        load_config(run, ["train.max_step=9"])
    with pytest.raises(ConfigError, match=r"train.lr=-1.0 must be above 0"):
        load_config(run, ["train.lr=-1"])
    with pytest.raises(ConfigError, match="objective=traflow cannot be changed on an existing run"):
        load_config(run, ["objective=traflow"])
    with pytest.raises(ConfigError, match="not understood"):
        load_config(run, ["--multirun"])


def test_a_moved_run_finds_its_own_teacher(saved, tmp_path):
    run, _ = saved
    run.root.rename(tmp_path / "elsewhere")
    config = load_config(RunDir(tmp_path / "elsewhere"))
    assert config.run.dir == str(tmp_path / "elsewhere")
    assert config.teacher["late"].path == f"{tmp_path}/elsewhere/teacher/models/step_00000004"


def test_a_new_name_is_a_new_run_beside_it(saved):
    run, _ = saved
    config = load_config(run, ["run.name=other"])
    assert (config.run.name, config.run.dir) == ("other", "runs/other")
    assert config.teacher["late"].path.startswith("runs/other/teacher/")


def test_a_broken_file_is_named(saved):
    run, _ = saved
    run.config.write_text("run: [")
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read"):
        load_config(run)
    run.config.write_text("")
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(run)
    run.config.unlink()
    with pytest.raises(ConfigError, match="is not a run"):
        load_config(run)
