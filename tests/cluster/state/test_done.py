"""What a run has already got: results count only for the checkpoint and settings asked for."""

import json
import os
import shutil

import pytest

from cluster.settings.hydra import compose
from cluster.state.done import steps_done, view_of
from cluster.state.evicted import oldest_verified
from distill.checkpoint import manifest
from distill.evaluation.evaluate import evaluate
from distill.run.files import RunDir, sha256_file, write_json

TEACHER = "teacher.pretrained.path"


def tiny(run, *overrides):
    teacher = run.teacher.model(3)
    (config,) = compose(
        ["experiment=tiny", f"run.dir={run.root}", f"{TEACHER}={teacher}", *overrides]
    )
    return config


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A run that is trained and evaluated."""
    folder = tmp_path_factory.mktemp("facts") / "run"
    run = RunDir(shutil.copytree(finished_run.root, folder))
    config = tiny(run)
    evaluate(run, config.data, config.teacher, config.eval, "traflow", "cpu")
    return run


@pytest.mark.parametrize(
    "override",
    [
        "eval.nfe=[1,2,4]",
        "eval.teacher_nfe=[4]",
        "eval.euler_nfe=[1]",
        "eval.reference_steps=5",
        "eval.num_samples=17",
        "eval.seed=99",
        "eval.extractor.name=inception",
        "eval.extractor.weights=FILE",
    ],
)
def test_results_of_another_evaluation_are_not_current(run, override):
    assert view_of(tiny(run)).has_results
    assert not view_of(tiny(run, override)).has_results


def test_results_of_another_step_or_of_an_older_version_are_not_current(run):
    results = json.loads(run.results.read_text())
    without = {key: value for key, value in results.items() if key != "settings"}
    try:
        for other in (results | {"step": 10}, without):
            write_json(run.results, other)
            assert not view_of(tiny(run)).has_results
    finally:
        write_json(run.results, results)


def test_a_supervisor_reads_a_checkpoint_once_until_somebody_touches_it(
    tmp_path, monkeypatch, write_checkpoint
):
    run, read = RunDir(tmp_path / "run"), []
    monkeypatch.setattr(
        manifest.files,
        "sha256_file",
        lambda path: read.append(path.parent.name) or sha256_file(path),
    )
    old, new = (write_checkpoint(run, step) for step in (2, 4))
    os.utime(
        new / "rank_00000.safetensors", (1e9, 1e9)
    )  # long ago: a file system's clock may tick slowly
    assert [steps_done(run) for _ in range(3)] == [4] * 3
    assert [oldest_verified(run.checkpoints) for _ in range(3)] == [2] * 3
    assert read == [new.name, old.name]
    (new / "rank_00000.safetensors").write_bytes(b"weighty")
    assert steps_done(run) == 2
    assert read == [new.name, old.name, new.name]
