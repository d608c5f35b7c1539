"""The list of settings: all of them, each with words, and the page is the list."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cluster.inspect.settings import page, show
from cluster.settings.hydra import compose
from cluster.settings.listing import search, settings
from distill.config import ConfigError, TrainConfig
from distill.objectives.config import OBJECTIVES

ROOT = Path(__file__).parents[3]


def keys_of(tree, prefix=""):
    """Keys of every value of a composed configuration; a teacher's name is NAME."""
    for key, value in tree.items():
        inside = {"teacher": "NAME", "more_teachers": "NAME"}.get(prefix.strip(".").split(".")[-1])
        below = f"{prefix}{inside or key}"
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{below}.")
        else:
            yield below


@pytest.mark.parametrize("preset", ["experiment=digits", "experiment=imagenet256_sit"])
def test_every_setting_that_a_run_has_is_listed(preset):
    (config,) = compose([preset, "cluster=slurm_gpu"])
    known = {one.key for one in settings()}
    found = set(keys_of(OmegaConf.to_container(OmegaConf.structured(config))))
    assert found - known <= {"run.command", "cluster.slurm.more_teachers"}


def test_every_setting_says_what_it_is_for():
    """A setting without words gets a comment behind its field."""
    assert [one.key for one in settings() if not one.words] == []


def test_the_page_is_the_list():
    """It is written by: bowstring settings --page > docs/settings.md"""
    assert (ROOT / "docs/settings.md").read_text() == page()


def test_a_row_says_type_default_words_and_whether_a_resume_may_change_it():
    rows = {(one.key, one.of): one for one in settings()}
    lr, steps = rows["train.lr", ""], rows["train.max_steps", ""]
    assert (lr.type, lr.default, lr.is_free) == ("float", str(TrainConfig().lr), False)
    assert steps.is_free and not rows["pretrain.train.max_steps", ""].is_free
    assert rows["train.batch_size", ""].words == "global, over all ranks and accumulation steps"
    assert rows["cluster.device_flops", ""].default == "2e10"
    chosen = "objective=traflow, objective=bezier"
    assert rows["objective.share_output", chosen].default == "0.15"
    assert (
        rows[
            "teacher.NAME.num_heads",
            ", ".join(f"teacher.NAME.kind={kind}" for kind in ("checkpoint", "sit", "edm")),
        ].type
        == "int"
    )


def test_every_objective_is_searched(capsys):
    for name, kind in OBJECTIVES.items():
        own = {one.key for one in search(f"objective={name}")}
        assert {f"objective.{key}" for key in vars(kind())} - own <= {
            "objective.name",
            "objective.distance",
            "objective.lpips_backbone",
        }
    assert show("zero_stage") == 0
    assert "train.zero_stage = 1  (int)" in capsys.readouterr().out


def test_a_word_that_no_setting_has():
    with pytest.raises(ConfigError, match=r"did you mean train\.lr"):
        show("train.lrr")
