"""run.json: every field is checked by name; a later format is refused with both versions."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from distill.config import ConfigError
from distill.run.files import RunDir, write_json
from distill.run.identity import FORMAT, read_record, write_record
from distill.testing import write_tiny_record

OLD = RunDir(Path(__file__).parents[2] / "fixtures" / "run-0.1")


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    write_tiny_record(run, {"train": {"lr": 0.1}}, teacher="f" * 64)
    return run


def changed(run, **fields):
    """run.json with other values; None leaves a field out."""
    tree = json.loads(run.identity.read_text()) | fields
    write_json(run.identity, {key: value for key, value in tree.items() if value is not None})


def refusal(run):
    """What is said of run.json, which is left as it is."""
    before = run.identity.read_bytes()
    with pytest.raises(ConfigError) as caught:
        read_record(run)
    assert run.identity.read_bytes() == before
    return str(caught.value)


def test_a_record_is_written_as_it_was_read_byte_for_byte(tmp_path):
    """But for what older versions did not write, which stands last."""
    copy = RunDir(tmp_path)
    write_record(copy, read_record(OLD))
    added = copy.identity.read_text()
    as_before = added.replace(',\n  "spread": 1', "").replace(',\n "trials": {}', "")
    assert as_before == OLD.identity.read_text() != added
    write_record(copy, read_record(copy))
    assert copy.identity.read_text() == added


def test_no_file_is_no_record(tmp_path):
    assert read_record(RunDir(tmp_path)) is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"schedule": None}, "it lacks the field 'schedule'"),
        ({"format": None}, "it lacks the field 'format'"),
        ({"colour": 3}, "it has the field 'colour', which is not known"),
        ({"seed": "x"}, 'it says seed="x", which is no whole number'),
        ({"seed": True}, "it says seed=true, which is no whole number"),
        ({"teachers": []}, "it says teachers=[], which is no object"),
        ({"schedule": {}}, "it says schedule={}, which is no list"),
        ({"schedule": [{"max_steps": 3}]}, "it lacks the field 'decay' in 'schedule'"),
        ({"stream": {"seed": 0}}, "it lacks the field 'samples_per_shard' in 'stream'"),
        ({"identity": {"train": {"lr": 0.2}}}, "its hash does not match its content"),
    ],
)
def test_a_field_that_is_missing_unknown_or_wrong_is_named(fields, sentence, run):
    changed(run, **fields)
    said = refusal(run)
    assert said.startswith(f"{run.identity} is corrupt") and sentence in said


def test_a_later_format_is_refused_with_both_versions(run):
    changed(run, format=FORMAT + 1, versions={"bowstring": "0.9.0"}, stream=None, shape=[1])
    said = refusal(run)
    ours = version("bowstring")
    assert f"{run.root} was written by bowstring 0.9.0 (run.json format {FORMAT + 1})" in said
    assert f"this is {ours}, which reads format {FORMAT}" in said and "--force-new NAME" in said


def test_a_later_version_with_the_same_format_is_read(run):
    changed(run, versions={"bowstring": "99.0"})
    assert read_record(run).versions == {"bowstring": "99.0"}


def test_what_a_later_version_added_is_named_with_both_versions(run):
    changed(run, versions={"bowstring": "99.0"}, colour=3)
    assert f"by bowstring 99.0, and this is {version('bowstring')}" in refusal(run)
    changed(run, versions={"bowstring": "0.0.1"})
    assert "written by bowstring" not in refusal(run)
