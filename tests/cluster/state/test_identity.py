"""run.json: the same run resumes, another is refused with a diff, nothing is overwritten."""

import json
from pathlib import Path

import pytest

from cluster.settings.hydra import compose
from cluster.state.identity import check_or_write, hash_of, identity_of, record_teachers
from distill.config import ConfigError
from distill.run.dir import RunDir


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tiny(*args: str):
    (config,) = compose(["experiment=tiny", *args])
    return config, RunDir(Path("runs/tiny"))


@pytest.mark.parametrize(
    "override",
    [
        "train.log_every=7",
        "train.save_every=7",
        "train.keep_every=4",
        "train.save_async=true",
        "train.wandb=project",
        "train.profile=true",
        "train.zero_stage=0",
        "train.offload=optimizer",
        "train.micro_batch=4",
        "train.activation_checkpointing=true",
        "train.compile=true",
        "cluster.teachers.num_workers=5",
        "trajectory.ready_ahead=99",
        "eval.num_samples=3",
        "run.name=other",
        "run.dir=/somewhere/else",
    ],
)
def test_what_changes_neither_data_nor_weights_resumes(override):
    config, _ = tiny()
    same, _ = tiny(override)
    assert identity_of(config) == identity_of(same)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1", "seed: the run has 0, asked for 1"),
        ("train.lr=0.5", "train.lr: the run has 0.001, asked for 0.5"),
        ("objective=endpoint", "objective.name: the run has traflow, asked for endpoint"),
        ("trajectory.passes=3", "trajectory.passes: the run has 2, asked for 3"),
        ("teacher.pretrained.guidance=3", "teacher.pretrained.guidance: the run has 1.5"),
        ("pretrain.train.max_steps=5", "pretrain.train.max_steps: the run has 4, asked for 5"),
        ("student=unet", "student.blocks_per_level: the run has none, asked for 2"),
    ],
)
def test_other_data_or_weights_are_refused_with_a_diff(override, line):
    config, run = tiny()
    assert check_or_write(config, run) == []
    before = run.identity.read_bytes()
    other, _ = tiny(override)
    with pytest.raises(ConfigError, match="started with other settings") as caught:
        check_or_write(other, run)
    assert line in str(caught.value)
    assert "--force-new NAME" in str(caught.value)
    assert run.identity.read_bytes() == before


def test_the_record_names_stream_versions_and_hash():
    config, run = tiny()
    check_or_write(config, run)
    record = json.loads(run.identity.read_text())
    assert record["hash"] == hash_of(record["identity"])
    assert record["stream"] == {
        "seed": 0,
        "samples_per_shard": 16,
        "block_shards": 2,
        "passes": 2,
        "batch_size": 16,
    }
    assert {"python", "torch", "ray", "deepspeed", "webdataset"} <= record["versions"].keys()


def test_a_longer_run_is_allowed_said_and_written_down():
    config, run = tiny()
    check_or_write(config, run)
    longer, _ = tiny("train.max_steps=9")
    (note,) = check_or_write(longer, run)
    assert note.startswith("train.max_steps changed from 6 to 9; the cosine decay is stretched")
    assert check_or_write(longer, run) == []
    schedule = json.loads(run.identity.read_text())["schedule"]
    assert [entry["max_steps"] for entry in schedule] == [6, 9]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}, "stream": {}}'])
def test_a_corrupt_record_is_named_and_left_alone(content):
    config, run = tiny()
    check_or_write(config, run)
    run.identity.write_text(content)
    with pytest.raises(ConfigError, match=r"run.json is corrupt"):
        check_or_write(config, run)
    assert run.identity.read_text() == content


def test_a_flipped_value_is_corruption():
    config, run = tiny()
    check_or_write(config, run)
    run.identity.write_text(run.identity.read_text().replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(ConfigError, match="hash does not match"):
        check_or_write(config, run)


def test_other_teacher_weights_are_refused():
    config, run = tiny()
    check_or_write(config, run)
    record_teachers(run, {"pretrained": "a" * 64})
    record_teachers(run, {"pretrained": "a" * 64})
    with pytest.raises(ConfigError, match=r"teacher.pretrained has other weights"):
        record_teachers(run, {"pretrained": "b" * 64})
    assert json.loads(run.identity.read_text())["teachers"] == {"pretrained": "a" * 64}


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    config, _ = tiny()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*run.dir="):
        check_or_write(config, RunDir(tmp_path / "file"))
