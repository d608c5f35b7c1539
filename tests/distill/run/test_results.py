"""results.json: written as ever, and refused with a sentence when it is another."""

import json

import pytest

from distill.config import ConfigError
from distill.run.files import RunDir
from distill.run.measured import read_results, write_results

ROW = {"distance_to_teacher": 0.5, "frechet": 1.5, "kid": 0.25, "kid_std": 0.125}
TREE = {  # the keys and their order are those of the file
    "run": "tiny",
    "objective": "traflow",
    "step": 20,
    "settings": {"num_samples": 600, "nfe": [1, 2], "extractor": {"name": "pixels"}},
    "model_sha256": "ab",
    "teacher": [{"nfe": 2, "solver": "heun", **ROW, "seconds_per_1000": 0.5}],
    "student": [{"nfe": 1, **ROW, "seconds_per_1000": 0.25}],
    "n": 600,
    "seed": 12345,
    "extractor": {
        "name": "pixels",
        "sha256": "cd",
        "features": 64,
        "feature_dtype": "float64",
        "moment_dtype": "float64",
        "kid_subsets": 10,
        "kid_subset_size": 500,
    },
    "frechet_name": "Fréchet distance (pixels)",
    "reference": {"name": "digits", "n": 1797, "sha256": "ef"},
    "truth": {
        "teacher": "t",
        "fingerprint": "aa",
        "guidance": 1.0,
        "solver": "heun",
        "nfe": 16,
        "precision": "fp32",
    },
    "device": "cpu",
    "cost": {"teacher_device_s": 2.0, "train_device_s": 20.0, "teacher_nfe": 512, "bytes": 1000},
    "labels": "data",
}
FURTHER = TREE | {"student": [{"nfe": 1, **ROW, "recall": 0.75, "seconds_per_1000": 0.25}]}
LATENTS = TREE | {
    "student": [{"nfe": 1, "distance_to_teacher": 0.5, "seconds_per_1000": 0.25}],
    "extractor": {"name": "none", "sha256": ""},
    "reference": {"name": "latents"},
}


@pytest.mark.parametrize("tree", [TREE, FURTHER, LATENTS])
def test_the_file_is_written_as_ever(tmp_path, tree):
    run, text = RunDir(tmp_path), json.dumps(tree, indent=1) + "\n"
    assert read_results(run) is None
    run.results.write_text(text)
    write_results(run, read_results(run))
    assert run.results.read_text() == text


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({}, "results.json lacks the field 'run'; make it again with `bowstring evaluate RUN`"),
        (TREE | {"colour": 1}, "results.json has the field 'colour', which is not known; make"),
        (TREE | {"student": [{"nfe": 1}]}, "lacks the field 'distance_to_teacher' in 'student'"),
    ],
)
def test_a_file_of_another_version_is_refused_with_what_to_do(tmp_path, tree, sentence):
    run = RunDir(tmp_path)
    run.results.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as error:
        read_results(run)
    assert sentence in str(error.value)
