"""run.json: the same run resumes, another is refused with a diff, nothing is overwritten."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from cluster.plan.stream import order_of
from cluster.settings import file
from cluster.settings.file import Removed
from cluster.settings.hydra import compose
from cluster.state.identity import check_or_write, difference, identity_of, record_teachers
from distill.config import ConfigError, since
from distill.run.events import Pool, Resume, Steps, append
from distill.run.files import RunDir, write_json
from distill.run.identity import hash_of, record_of
from distill.testing import tiny_spec, write_tiny_shards

FIXTURES = Path(__file__).parents[2] / "fixtures"
HASHES = json.loads((FIXTURES / "identity_hashes.json").read_text())


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tiny(*args: str):
    (config,) = compose(["experiment=tiny", *args])
    return config, RunDir(Path("runs/tiny"))


def begin(config, run):
    """Writes run.json, and the first step: from here on the settings stand."""
    assert check_or_write(config, run)[1] == []
    append(run, Steps(0, 0, "0"))


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
    begin(config, run)
    before = run.identity.read_bytes()
    other, _ = tiny(override)
    with pytest.raises(ConfigError, match="started with other settings") as caught:
        check_or_write(other, run)
    assert line in str(caught.value)
    assert "(bowstring run runs/tiny)" in str(caught.value)
    assert "--force-new NAME" in str(caught.value)
    assert run.identity.read_bytes() == before


def test_a_run_without_a_step_or_a_shard_takes_new_settings_without_a_word():
    config, run = tiny()
    check_or_write(config, run)
    append(run, Pool(1, 2), Resume(0, 1))
    other, _ = tiny("train.lr=0.5", "seed=3")
    record, notes = check_or_write(other, run)
    assert notes == [] and record == record_of(run)
    assert record.identity == identity_of(other) and record.seed == 3


@pytest.mark.parametrize("made", ["shard", "evicted", "checkpoint", "kept", "teacher", "step"])
def test_whatever_was_made_keeps_its_settings(made, write_checkpoint):
    config, run = tiny()
    check_or_write(config, run)
    match made:
        case "shard":
            write_tiny_shards(run, tiny_spec(), [0])
        case "evicted":
            write_tiny_shards(run, tiny_spec(), [0])
            run.tar(0).unlink()
        case "checkpoint":
            write_checkpoint(run, 2)
        case "kept":
            write_checkpoint(run, 2)
            run.checkpoints.rename(run.root / "kept")
            run.checkpoints.mkdir()
            (run.root / "kept").rename(run.checkpoints / "kept")
        case "teacher":
            write_checkpoint(run.teacher, 2)
        case "step":
            append(run, Steps(0, 0, "0"))
    with pytest.raises(ConfigError, match="started with other settings"):
        check_or_write(tiny("seed=3")[0], run)


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
        "spread": 1,
    }
    assert {"python", "torch", "ray", "deepspeed", "webdataset"} <= record["versions"].keys()


def test_a_longer_run_is_allowed_said_and_written_down():
    config, run = tiny()
    check_or_write(config, run)
    longer, _ = tiny("train.max_steps=9")
    _, (note,) = check_or_write(longer, run)
    assert note.startswith("train.max_steps changed from 6 to 9; the cosine decay is stretched")
    assert check_or_write(longer, run)[1] == []
    schedule = json.loads(run.identity.read_text())["schedule"]
    assert [entry["max_steps"] for entry in schedule] == [6, 9]


def test_a_run_older_than_the_spread_of_passes_read_its_blocks_in_turn():
    config, run = tiny("trajectory.spread=4")
    begin(config, run)
    assert order_of(record_of(run).stream) == config.trajectory.order(0, 16)
    content = rewritten(run, lambda identity: identity["trajectory"].pop("spread"))
    record = json.loads(content)
    del record["stream"]["spread"]
    write_json(run.identity, record)
    assert order_of(record_of(run).stream).spread == 1
    check_or_write(tiny("trajectory.spread=1")[0], run)
    line = r"trajectory\.spread: the run has 1, since it is older than this setting, asked for 4"
    with pytest.raises(ConfigError, match=line):
        check_or_write(config, run)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}, "stream": {}}'])
def test_a_corrupt_record_is_named_and_left_alone(content):
    config, run = tiny()
    begin(config, run)
    run.identity.write_text(content)
    with pytest.raises(ConfigError, match=r"run.json is corrupt"):
        check_or_write(config, run)
    assert run.identity.read_text() == content


def test_a_flipped_value_is_corruption():
    config, run = tiny()
    begin(config, run)
    run.identity.write_text(run.identity.read_text().replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(ConfigError, match="hash does not match"):
        check_or_write(config, run)


def test_other_teacher_weights_are_refused():
    config, run = tiny()
    begin(config, run)
    record_teachers(run, record_of(run), {"pretrained": "a" * 64})
    record_teachers(run, record_of(run), {"pretrained": "a" * 64})
    with pytest.raises(ConfigError, match=r"teacher.pretrained has other weights"):
        record_teachers(run, record_of(run), {"pretrained": "b" * 64})
    assert json.loads(run.identity.read_text())["teachers"] == {"pretrained": "a" * 64}


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    config, _ = tiny()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*run.dir="):
        check_or_write(config, RunDir(tmp_path / "file"))


@pytest.mark.parametrize("settings", HASHES)
def test_the_hash_of_a_run_is_the_one_on_file(settings):
    (config,) = compose(settings.split())
    assert hash_of(identity_of(config)) == HASHES[settings]


# -----------------------------------------------------------------------------------------------
# Settings come and go


def rewritten(run, change):
    """run.json whose identity is another one, whole otherwise; its bytes."""
    record = json.loads(run.identity.read_text())
    change(record["identity"])
    write_json(run.identity, record | {"hash": hash_of(record["identity"])})
    return run.identity.read_bytes()


@pytest.mark.parametrize(
    ("now", "then"), [("traflow_summed", "traflow"), ("bezier_guides", "bezier")]
)
def test_an_objective_that_version_0_1_called_otherwise_is_the_same_run(now, then):
    config, run = tiny(f"objective={now}", "run.name=tiny")
    begin(config, run)
    before = rewritten(run, lambda identity: identity["objective"].update(name=then))
    assert check_or_write(config, run)[1] == [] and run.identity.read_bytes() == before
    drawn, _ = tiny(f"objective={then}", "run.name=tiny")
    with pytest.raises(ConfigError, match=f"name: the run has {now}, asked for {then}"):
        check_or_write(drawn, run)


@pytest.mark.parametrize(
    ("key", "default", "other"),
    [
        ("train.grad_clip", "1.0", "2.0"),
        ("train.betas", "[0.9, 0.99]", "[0.5, 0.6]"),
        ("trajectory.store_noise", "True", "False"),
        ("data.num_classes", "0", "5"),
        ("student.mlp_ratio", "4.0", "2.0"),
        ("teacher.pretrained.guidance", "1.0", "3.0"),
        ("objective.power", "0.3", "0.5"),
        ("trajectory.store_velocity", "False", "True"),
        ("pretrain.train.weight_decay", "0.0", "0.5"),
    ],
)
def test_a_setting_that_an_older_run_lacks_counts_as_its_default(key, default, other):
    config, run = tiny(f"{key}={default}")
    begin(config, run)
    *parents, name = key.split(".")

    def remove(identity):
        for parent in parents:
            identity = identity[parent]
        del identity[name]

    before = rewritten(run, remove)
    record, notes = check_or_write(config, run)
    assert notes == [] and run.identity.read_bytes() == before
    assert record.hash == hash_of(record.identity)
    asked, _ = tiny(f"{key}={other}")
    with pytest.raises(ConfigError, match="started with other settings") as caught:
        check_or_write(asked, run)
    line = f"{key}: the run has {default}, since it is older than this setting, "
    assert line + f"asked for {other}" in str(caught.value)
    assert run.identity.read_bytes() == before


def test_a_setting_may_say_what_was_so_before_it():
    @dataclass
    class Settings:
        old: int = 1
        spread: int = since("0.3", 8, before=1)
        times: list[int] = since("0.3", list, before=lambda: [3, 4])

    new = Settings()
    assert (new.spread, new.times) == (8, [])
    assert difference({"old": 1}, {"old": 1, "spread": 1, "times": [3, 4]}, new) == []
    assert difference({"old": 1}, asdict(new), new) == [
        "spread: the run has 1, since it is older than this setting, asked for 8",
        "times: the run has [3, 4], since it is older than this setting, asked for []",
    ]
    assert difference({"old": 1, "spread": 8, "times": []}, asdict(new), new) == []


def test_a_group_that_an_older_run_lacks_counts_as_its_defaults():
    config, run = tiny()
    begin(config, run)
    rewritten(run, lambda identity: identity.pop("pretrain"))
    with pytest.raises(
        ConfigError, match=r"pretrain\.train\.batch_size: the run has 256, since it"
    ):
        check_or_write(config, run)


def test_another_teacher_is_not_taken_for_an_older_run():
    config, run = tiny()
    begin(config, run)
    rewritten(run, lambda identity: identity["teacher"].clear())
    with pytest.raises(ConfigError, match=r"teacher\.pretrained\.steps: the run has none, asked"):
        check_or_write(config, run)


def test_a_setting_that_is_no_more_is_named_with_what_to_do(monkeypatch):
    config, run = tiny()
    begin(config, run)
    rewritten(run, lambda identity: identity["train"].update(warmth=3))
    with pytest.raises(ConfigError, match=r"train\.warmth: the run has 3, asked for none"):
        check_or_write(config, run)
    monkeypatch.setitem(file.REMOVED, "train.warmth", Removed("0.3", "start it anew with lr"))
    with pytest.raises(ConfigError) as caught:
        check_or_write(config, run)
    line = (
        "train.warmth: the run has 3, which is no more since bowstring 0.3: start it anew with lr"
    )
    assert line in str(caught.value)


def test_what_a_later_version_knows_is_refused_with_both_versions():
    config, run = tiny()
    begin(config, run)
    rewritten(run, lambda identity: identity["train"].update(warmth=3))
    record = json.loads(run.identity.read_text())
    write_json(run.identity, record | {"versions": {"bowstring": "99.0"}})
    with pytest.raises(ConfigError, match=r"by bowstring 99\.0, and this is .*:\n  train\.warmth"):
        check_or_write(config, run)
