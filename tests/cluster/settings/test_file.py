"""config.yaml holds a run's settings exactly, follows a moved run, refuses what cannot change."""

import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cluster.settings import file
from cluster.settings.file import Removed, load_config, save_config, to_tree
from cluster.settings.hydra import compose
from distill.config import SINCE, ConfigError, Since, TrainConfig
from distill.data.config import TrajectoryConfig
from distill.networks.config import UNetConfig
from distill.objectives.config import TraFlowConfig
from distill.run.files import RunDir, write_json
from distill.teachers.config import NativeConfig
from distill.testing import write_tiny_record


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


# -----------------------------------------------------------------------------------------------
# Runs of other versions


@pytest.mark.parametrize(
    ("key", "kind", "before"),
    [
        ("trajectory.store_noise", TrajectoryConfig, False),
        ("pretrain.train.betas", TrainConfig, [0.1, 0.2]),
        ("teacher.late.weight", NativeConfig, 3.0),
        ("student.blocks_per_level", UNetConfig, 5),
        ("objective.power", TraFlowConfig, 0.9),
    ],
)
def test_a_run_older_than_a_setting_has_what_was_so_before_it(
    key, kind, before, saved, monkeypatch
):
    run, config = saved
    stored = OmegaConf.load(run.config)
    assert OmegaConf.select(to_tree(config), key) != before
    section, _, name = key.rpartition(".")
    del OmegaConf.select(stored, section)[name]
    run.config.write_text(OmegaConf.to_yaml(stored))
    assert load_config(run) == config  # a setting without a word of it has its default
    (one,) = (one for one in fields(kind) if one.name == name)
    monkeypatch.setattr(one, "metadata", {SINCE: Since("0.3", before)})
    assert OmegaConf.select(to_tree(load_config(run)), key) == before
    given = OmegaConf.select(to_tree(config), key)
    said = f"{key}={str(given).lower() if isinstance(given, bool) else given}"
    assert load_config(run, [said]) == config
    save_config(run, config)
    assert load_config(run) == config


def test_a_meanflow_of_version_0_2_trains_on_as_it_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["distance=pseudo_huber", "p_diagonal=0.25", "times=after", "adaptive_power=0"]
    (config,) = compose(
        ["experiment=tiny", "objective=meanflow", *[f"objective.{word}" for word in words]]
    )
    run = RunDir(Path(config.run.dir))
    save_config(run, config)
    stored = OmegaConf.load(run.config)
    known = {"name", "distance", "lpips_backbone", "p_diagonal", "derivative"}
    stored.objective = {key: stored.objective[key] for key in known}
    run.config.write_text(OmegaConf.to_yaml(stored))
    assert load_config(run) == config


@pytest.mark.parametrize(
    ("gone", "old", "stored", "said"),
    [
        ("train.warmth", "  lr: 0.0003", "  lr: 0.0003\n  warmth: 3", "a setting train.warmth"),
        (
            "teacher.*.heads",
            "    path: runs/",
            "    heads: 1\n    path: runs/",
            "a setting teacher.early.heads",
        ),
        ("train.decay=cosine", "", "", "train.decay=cosine"),
    ],
)
def test_what_is_no_more_is_named_with_since_when_and_what_to_do(
    gone, old, stored, said, saved, monkeypatch
):
    run, _ = saved
    text = run.config.read_text()
    assert old in text
    run.config.write_text(text.replace(old, stored))
    monkeypatch.setitem(file.REMOVED, gone, Removed("0.3", "take another run"))
    with pytest.raises(ConfigError) as caught:
        load_config(run)
    sentence = f"there was {said}, which is no more since bowstring 0.3: take another run"
    assert str(caught.value) == sentence


def test_the_command_line_is_told_too(monkeypatch):
    monkeypatch.setitem(file.REMOVED, "train.warmth", Removed("0.3", "set train.lr"))
    with pytest.raises(ConfigError, match=r"a setting train\.warmth, .* 0\.3: set train\.lr"):
        compose(["experiment=tiny", "+train.warmth=3"])
    monkeypatch.setitem(file.REMOVED, "train.decay=constant", Removed("0.4", "set cosine"))
    with pytest.raises(ConfigError, match=r"train\.decay=constant, .* 0\.4: set cosine"):
        compose(["experiment=tiny", "train.decay=constant"])


def test_a_later_version_is_named_rather_than_its_settings(saved):
    run, _ = saved
    run.config.write_text(run.config.read_text() + "colour: red\n")
    write_tiny_record(run, {})
    with pytest.raises(ConfigError, match="there is no setting colour") as caught:
        load_config(run)
    assert "written by bowstring" not in str(caught.value)
    record = json.loads(run.identity.read_text()) | {"versions": {"bowstring": "99.0"}}
    write_json(run.identity, record)
    ours = version("bowstring")
    with pytest.raises(ConfigError, match=rf"colour.*by bowstring 99\.0, and this is {ours}"):
        load_config(run)
    write_json(run.identity, record | {"format": 2})
    with pytest.raises(ConfigError, match=rf"by bowstring 99\.0 \(.* format 2\), this is {ours},"):
        load_config(run)
