"""A student of an earlier run as teacher: by its folder, without pre-training, to any depth."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.plan.estimate import estimate, teacher_forwards
from cluster.settings.hydra import compose
from cluster.settings.schema import own_teachers
from cluster.state.done import view_of, with_absolute_paths
from cluster.state.identity import check_or_write
from cluster.supervisor.session import open_session
from cluster.supervisor.stages import Work, pretrain, run_spec, with_models
from distill.config import ConfigError
from distill.data.layout import stored_dtype
from distill.data.shards import read_shard
from distill.data.stores.store import read_sidecar
from distill.evaluation.evaluate import evaluate
from distill.export.student import export_run
from distill.flow.solvers import solve
from distill.networks.files import fingerprint, load_model
from distill.run.files import RunDir

CHAIN = """
import sys
from cluster.settings.hydra import compose
from cluster.supervisor.runner import run
for folder, *overrides in [words.split() for words in sys.argv[1:]]:
    (config,) = compose(["experiment=tiny", f"run.dir={folder}", *overrides])
    if run(config):
        sys.exit(1)
"""


def stored_states(run):
    """Noise, states [N, K+1, 1, 8, 8] and labels of a run's first shard."""
    sidecar = read_sidecar(run, 0)
    spec, labels = sidecar.spec, np.empty(len(sidecar.labels), dtype=np.int64)
    stored = np.empty((len(labels), *spec.sample_shape), dtype=stored_dtype(spec))
    read_shard(run, spec, 0, stored, labels)
    states = torch.from_numpy(stored.astype("float32"))[:, 0]
    return states[:, 0], states, torch.from_numpy(labels)


@pytest.fixture(scope="module")
def earlier(finished_run, tmp_path_factory):
    """A finished run that these tests may write to."""
    return RunDir(shutil.copytree(finished_run.root, tmp_path_factory.mktemp("earlier") / "run"))


def student_of(before, folder, *overrides):
    """The configuration of a tiny run in `folder` whose teacher is the student of `before`."""
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={folder}",
            "teacher=student",
            f"teacher.student.path={before}",
            "teacher.student.steps=8",
            *overrides,
        ]
    )
    return with_absolute_paths(config)


def test_the_folder_of_a_run_stands_for_its_newest_student(earlier, tmp_path):
    config = with_models(student_of(earlier.root, tmp_path / "run"))
    folder = earlier.model(20)
    assert config.teacher["student"].path == str(folder)
    assert load_model(folder, "cpu")[1]["kind"] == "student"
    again = with_models(config)  # a model folder is taken as it is
    assert again == config


def test_an_exported_student_outlives_the_checkpoints(earlier, tmp_path):
    left = RunDir(tmp_path / "left")
    exported = export_run(earlier, left.root / "student")
    left.identity.write_bytes(earlier.identity.read_bytes())
    config = with_models(student_of(left.root, tmp_path / "run"))
    assert config.teacher["student"].path == str(exported)


def test_a_run_without_a_student_is_a_sentence(earlier, tmp_path):
    bare = RunDir(tmp_path / "bare")
    bare.root.mkdir()
    bare.identity.write_bytes(earlier.identity.read_bytes())
    with pytest.raises(ConfigError, match=r"bare has no checkpoint yet; train it first"):
        with_models(student_of(bare.root, tmp_path / "run"))


def test_nothing_is_pre_trained_and_the_fingerprint_is_recorded(earlier, tmp_path):
    config = with_models(student_of(earlier.root, tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    assert own_teachers(config) == {}
    assert "pretrain" not in estimate(config)["exact"]["forwards"]
    with open_session(config, run) as session:
        view = view_of(config, check_or_write(config, run)[0])
        assert pretrain(session, view) == Work()
        spec = run_spec(view)
    expected = fingerprint(earlier.model(20) / "model.safetensors")
    assert json.loads(run.identity.read_text())["teachers"] == {"student": expected}
    assert [teacher.fingerprint for teacher in spec.teachers] == [expected]


def test_guidance_of_a_student_is_refused_before_any_work(earlier, tmp_path):
    config = with_models(student_of(earlier.root, tmp_path / "run", "teacher.student.guidance=1.5"))
    with open_session(config, RunDir(tmp_path / "run")) as session:
        view = view_of(config, check_or_write(config, session.run)[0])
        with pytest.raises(ConfigError, match=r"guidance=1\.5 .*set teacher\.NAME\.guidance=1"):
            run_spec(view)


def test_the_estimate_counts_one_forward_for_a_jump(earlier, tmp_path):
    config = student_of(earlier.root, tmp_path / "run")
    (heun,) = config.teacher.values()
    assert teacher_forwards(heun) == 16
    assert teacher_forwards(replace(heun, solver="jumps")) == 8


def test_a_jumping_teacher_is_its_own_truth(earlier, tmp_path, data):
    """The student of the run is compared with itself, jump for jump: no distance at 8 NFE."""
    jumping = student_of(earlier.root, tmp_path, "teacher.student.solver=jumps", "eval.nfe=[1,8]")
    config = with_models(jumping)
    results = evaluate(earlier, data, config.teacher, config.eval, "traflow", "cpu")
    assert (results.truth.solver, results.truth.nfe) == ("jumps", 8)
    distance = {row.nfe: row.distance_to_teacher for row in results.student}
    assert distance[8] < 1e-10 < distance[1]
    assert [(row.solver, row.nfe) for row in results.teacher] == [("jumps", 1), ("jumps", 4)]
    assert results.teacher[0].distance_to_teacher == pytest.approx(distance[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reflow_of_reflow_of_reflow(tmp_path):
    """Three runs by the command's own path: each is the teacher of the next."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    by = "teacher.pretrained"
    commands = [
        f"{first} objective=reflow",
        f"{second} objective=reflow {by}.path={first} {by}.guidance=1",
        f"{third} objective=reflow teacher=student teacher.student.path={second}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHAIN, *commands],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [RunDir(folder) for folder in (first, second, third)]
    assert all(run.report.exists() for run in runs)
    assert [run.teacher.root.exists() for run in runs] == [True, False, False]
    for before, later in itertools.pairwise(runs):
        model = before.model(6)
        teachers = json.loads(later.identity.read_text())["teachers"]
        assert list(teachers.values()) == [fingerprint(model / "model.safetensors")]
        noise, states, labels = stored_states(later)
        network, _ = load_model(model, "cpu")

        def field(x, t, network=network, labels=labels):
            times = t.expand(len(x))
            return network(x, times, times, labels)

        times = torch.linspace(0, 1, 9, dtype=torch.float64)
        expected = solve(field, noise, times, "heun", 2)  # 16 steps on a grid of 8
        # The rounding of float16 at |x| < 8; the model before it is three times as far.
        torch.testing.assert_close(states, expected.transpose(0, 1), rtol=0, atol=3e-3)
