"""Where an export may go, and what stands there when it does not come about; its model card."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.config import ConfigError, LossyExport
from distill.evaluation.config import EvalConfig
from distill.evaluation.evaluate import evaluate
from distill.export import student as students
from distill.export.build import export_student
from distill.report.sections import number, write_report
from distill.run.files import RunDir
from distill.run.measured import read_results
from distill.sample import load_student


def copy_of(run: RunDir, folder: Path) -> RunDir:
    """The run before its evaluation: other tests evaluate the one they share."""
    left_out = shutil.ignore_patterns("results.json", "samples")
    return RunDir(shutil.copytree(run.root, folder / "tiny", ignore=left_out))


def export(run, out, overwrite=False, form="student", dtype="fp32", license_id="unknown"):
    return export_student(run, form, out, overwrite, dtype, license_id)


def test_a_folder_that_is_there_is_replaced_when_that_is_asked_for_alone(finished_run, tmp_path):
    out = export(finished_run, tmp_path / "out")
    (out / "old").touch()
    with pytest.raises(ConfigError, match="out is there already; replace it with --overwrite"):
        export(finished_run, out)
    assert (out / "old").exists()
    export(finished_run, out, overwrite=True)
    assert not (out / "old").exists()
    assert load_student(out, "cpu").meta["step"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_another_kind_is_never_replaced(finished_run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    for out in (tmp_path / "thesis", tmp_path / "thesis/chapter.tex"):
        with pytest.raises(ConfigError, match="is no export, and --overwrite replaces nothing"):
            export(finished_run, out, overwrite=True)
    assert (tmp_path / "thesis/chapter.tex").exists()


def test_what_fails_leaves_the_old_one(finished_run, tmp_path, monkeypatch):
    out = export(finished_run, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*given):
        raise LossyExport("other")

    monkeypatch.setattr(students, "check_same", fail)
    with pytest.raises(LossyExport):
        export(finished_run, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_precision_that_a_format_does_not_have_is_refused(finished_run, tmp_path):
    with pytest.raises(ConfigError, match="--dtype bf16 is for --format diffusers; student is"):
        export(finished_run, tmp_path / "out", dtype="bf16")


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint yet; train it first"):
        export(RunDir(tmp_path / "empty"), tmp_path / "out")


def test_the_card_of_a_run_that_was_not_evaluated_says_how(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path)
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "Not evaluated yet: `bowstring evaluate RUN`" in text
    assert "Not named yet: `bowstring export --license ID`" in text


def test_the_card_holds_the_numbers_of_the_run(finished_run, data, teachers, tmp_path):
    run = copy_of(finished_run, tmp_path)
    settings = EvalConfig(num_samples=64, nfe=[1, 2], teacher_nfe=[], euler_nfe=[2])
    evaluate(run, data, teachers, settings, "traflow", "cpu")
    write_report(run, "bowstring run")
    out = export(run, tmp_path / "out", license_id="apache-2.0")
    card, results = ModelCard.load(out / "README.md"), read_results(run)
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert {"few-step", "distillation"} < set(card.data.tags)
    assert (out / "pictures.png").read_bytes() == (run.samples / "overview.png").read_bytes()
    for row in results.student:
        numbers = [row.nfe, row.distance_to_teacher, row.frechet, row.kid, row.seconds_per_1000]
        assert f"| student | {' | '.join(number(found) for found in numbers)} |" in card.text
    assert f"{results.n} samples of seed {results.seed}" in card.text
    assert results.frechet_name in card.text and results.extractor.sha256[:16] in card.text
    assert "`traflow`" in card.text and "`tiny`" in card.text
    assert "device hours" in card.text
    assert json.loads((out / "model.json").read_text())["meta"]["step"] == 20
    for word in ("from distill.sample import load_student", "![Rows"):
        assert word in card.text
