"""What a stage refuses before anything starts, seen from a description of the teacher."""

import json

import pytest

from cluster.plan.estimate import stages as work
from cluster.settings.hydra import compose
from cluster.state.done import view_of
from cluster.supervisor.stages import run_spec
from distill.config import ConfigError


def mixture(folder, guidance: float, path: str = ""):
    """A run on digits with a closed-form teacher without classes."""
    file = folder / "mixture.json"
    numbers = {"shape": [1, 8, 8], "means": [[0.0] * 64], "stds": [0.5]}
    file.write_text(json.dumps(numbers))
    (config,) = compose(
        [
            "experiment=digits",
            f"run.dir={folder / 'run'}",
            "teacher.pretrained.kind=analytic",
            f"teacher.pretrained.guidance={guidance}",
            f"teacher.pretrained.path={path or file}",
        ]
    )
    return config


def test_guidance_of_a_teacher_without_classes_is_refused_before_ray_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"guidance=1.5 needs a teacher with classes"):
        run_spec(view_of(mixture(tmp_path, 1.5)))
    assert not (tmp_path / "run").exists()


def test_only_teachers_that_a_run_can_make_count_as_its_pre_training(tmp_path):
    inside = str(tmp_path / "run" / "teacher" / "models" / "step_00000001")
    assert "pretrain" not in work(mixture(tmp_path, 1.0, inside), 1e12)
    (native,) = compose(["experiment=digits", f"run.dir={tmp_path / 'run'}"])
    assert "pretrain" in work(native, 1e12)
