"""A teacher has the settings of its kind: from the command line, from YAML and in old runs."""

import pytest
import yaml

from cluster.settings.file import load_config, save_config
from cluster.settings.hydra import compose
from cluster.state.identity import check_or_write, identity_of
from distill.config import ConfigError
from distill.run.identity import hash_of, record_of
from distill.teachers.config import TEACHERS, NativeConfig, SiTConfig


def one(tmp_path, *args):
    return compose(["experiment=digits", f"run.dir={tmp_path / 'run'}", *args])[0]


@pytest.mark.parametrize("kind", TEACHERS)
def test_each_kind_from_the_command_line(tmp_path, kind):
    words = "{only: {kind: " + kind + ", path: some/where, steps: 8}}"
    teacher = one(tmp_path, "~teacher", f"+teacher={words}").teacher["only"]
    assert teacher == TEACHERS[kind](path="some/where", steps=8, precision="fp32")


def test_words_may_change_the_kind_and_then_its_own_settings(tmp_path):
    words = ["kind=sit", "path=file.pt", "num_heads=16"]
    config = one(tmp_path, *(f"teacher.pretrained.{word}" for word in words))
    teacher = config.teacher["pretrained"]
    assert isinstance(teacher, SiTConfig)
    assert teacher.num_heads == 16
    save_config(config.files, config)
    assert load_config(config.files) == config
    changed = load_config(config.files, ["teacher.pretrained.num_heads=8"])
    assert changed.teacher["pretrained"].num_heads == 8


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("num_heads=2", r"no setting teacher\.pretrained\.num_heads .*kind=native.* kind, path"),
        ("num_headz=2", r"no setting teacher\.pretrained\.num_headz; did you mean .*num_heads"),
        ("kind=flux", r"teacher\.kind=flux is not known; choose one of: native, "),
        ("steps=many", r"teacher\.pretrained\.steps"),
    ],
)
def test_what_a_kind_has_not_is_a_sentence(tmp_path, word, match):
    with pytest.raises(ConfigError, match=match):
        one(tmp_path, f"teacher.pretrained.{word}")
    config = one(tmp_path)
    save_config(config.files, config)
    with pytest.raises(ConfigError, match=match):
        load_config(config.files, [f"teacher.pretrained.{word}"])


def test_a_run_whose_files_have_a_sits_heads_for_every_kind_opens_and_resumes(tmp_path):
    """As version 0.1 wrote config.yaml and run.json."""
    config = one(tmp_path)
    save_config(config.files, config)
    tree = yaml.safe_load(config.files.config.read_text())
    tree["teacher"]["pretrained"]["num_heads"] = 0
    config.files.config.write_text(yaml.safe_dump(tree))
    opened = load_config(config.files)
    assert opened == config
    assert isinstance(opened.teacher["pretrained"], NativeConfig)
    identity = identity_of(config)
    assert identity["teacher"]["pretrained"]["num_heads"] == 0
    check_or_write(config, config.files)
    assert record_of(config.files).hash == hash_of(identity)
    assert check_or_write(opened, config.files)[1] == []
