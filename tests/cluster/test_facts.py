"""What a run has already got: results count only for the checkpoint and settings asked for."""

import json
import shutil

import pytest

from cluster.compose import compose
from cluster.facts import results_are_current
from distill.evaluate import evaluate
from distill.rundir import RunDir, write_json

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
    assert results_are_current(tiny(run), run)
    assert not results_are_current(tiny(run, override), run)


def test_results_of_another_step_or_of_an_older_version_are_not_current(run):
    results = json.loads(run.results.read_text())
    without = {key: value for key, value in results.items() if key != "settings"}
    try:
        for other in (results | {"step": 10}, without):
            write_json(run.results, other)
            assert not results_are_current(tiny(run), run)
    finally:
        write_json(run.results, results)
