"""`import bowstring`: ten lines that work, in one process, and a sentence for every mistake."""

import inspect
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import bowstring
from bowstring import api
from distill.data.config import TrajectoryConfig
from distill.data.generate import generate_shard
from distill.networks.files import WEIGHTS
from distill.objectives.config import OBJECTIVES, DrawnConfig


@pytest.fixture(scope="module")
def teacher(finished_run):
    return bowstring.load_teacher(finished_run.root, device="cpu", guidance=2.0)


@pytest.fixture(scope="module")
def pairs(teacher):
    return bowstring.make_trajectories(teacher, 64)


def test_the_ten_lines_are_a_program_without_ray(finished_run, tmp_path):
    """Those of the package's own docstring, word for word but for the folder of the teacher."""
    lines = [line[4:] for line in inspect.getdoc(bowstring).splitlines() if line.startswith("    ")]
    program = "\n".join(lines).replace(
        "runs/digits/teacher/models/step_00001000", str(finished_run.teacher.model(3))
    )
    assert str(finished_run.root) in program and len(lines) <= 12
    check = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\n{check}"],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=tmp_path,
        check=True,
    )
    *rows, modules = result.stdout.splitlines()
    table = [[float(number) for number in row.split()] for row in rows]
    assert [row[0] for row in table] == [1, 2, 4]
    assert {"ray", "deepspeed", "cluster", "hydra"}.isdisjoint(modules.split())
    assert (tmp_path / "student" / WEIGHTS).is_file()


def test_a_student_of_its_teachers_architecture_starts_as_its_euler_solver(finished_run):
    teacher = bowstring.load_teacher(finished_run.root, device="cpu")
    for row in bowstring.compare(bowstring.make_student(teacher), teacher, nfe=[1, 4], num=32):
        assert row.student == pytest.approx(row.teacher, rel=1e-5)


def test_training_brings_the_student_nearer_and_leaves_the_old_one_as_it_was(teacher, pairs):
    losses, before = [], bowstring.make_student(teacher)

    class Losses(bowstring.Callback):
        def step(self, step: bowstring.Step) -> None:
            losses.append(float(step.loss))

    weights = {name: value.clone() for name, value in before.network.state_dict().items()}
    objective = bowstring.make_objective("endpoint")
    after = bowstring.train(before, pairs, objective, 60, 32, [Losses()], lr=3e-3)
    start, end = (bowstring.compare(one, teacher, nfe=[1], num=64)[0] for one in (before, after))
    assert len(losses) == 60 and end.student < 0.7 * start.student
    assert all(torch.equal(value, weights[n]) for n, value in before.network.state_dict().items())
    assert (after.meta["objective"], after.meta["step"]) == ("endpoint", 60)


def test_a_saved_student_opens_again_and_gives_the_same_images(teacher, pairs, tmp_path):
    objective = bowstring.make_objective("endpoint")
    student = bowstring.train(bowstring.make_student(teacher), pairs, objective, 2)
    opened = bowstring.load_student(student.save(tmp_path / "student"), "cpu")
    assert torch.equal(opened.sample(4, labels=[1, 2]), student.sample(4, labels=[1, 2]))
    assert opened.meta["objective"] == "endpoint"
    with pytest.raises(bowstring.ConfigError, match="is there already"):
        student.save(tmp_path / "student")


def test_trajectories_are_those_of_a_run_of_the_same_seed(teacher, pairs):
    settings = TrajectoryConfig(samples_per_shard=64)
    shard = generate_shard({"t": teacher.model}, {"t": teacher.config}, settings, 0, 0, "cpu")
    assert torch.equal(pairs.shard.states, shard.states)
    assert torch.equal(pairs.noise[:4], shard.states[:4, 0, 0]) and len(pairs) == 64
    ends = teacher.solve(pairs.noise, pairs.labels)
    assert torch.allclose(ends, pairs.images, atol=1e-5)


def test_every_sample_is_read_once_before_any_is_read_again(pairs):
    source = api._Memory(pairs, api.TrainConfig(max_steps=8, batch_size=16))
    ids = np.concatenate([source.read(step).ids.numpy() for step in range(8)])
    assert sorted(ids[:64]) == list(range(64)) and sorted(ids[64:]) == list(range(64))


def test_several_teachers_share_noise(teacher):
    weak = replace(teacher, config=replace(teacher.config, steps=8, solver="euler", weight=3.0))
    both = bowstring.make_trajectories([weak, teacher], 4, grid=4)
    assert both.shard.states.shape == (4, 2, 5, 1, 8, 8)
    assert both.weights.tolist() == [[0.75, 0.25]]
    assert torch.equal(both.shard.states[:, 0, 0], both.shard.states[:, 1, 0])


def test_the_teacher_draws_from_the_noise_of_a_student_of_the_same_seed(finished_run):
    teacher = bowstring.load_teacher(finished_run.root, device="cpu")
    student = bowstring.make_student(teacher)
    drawn = teacher.sample(6, nfe=4, seed=3, labels=[1, 2], solver="euler")
    gap = (drawn.int() - student.sample(6, nfe=4, seed=3, labels=[1, 2]).int()).abs()
    assert gap.max() <= 1  # the last bit of a sum in float32 and of one in float64


@pytest.mark.parametrize("name", ["traflow", "bezier", "scot", "ctm", "ayf"])
def test_an_objective_is_what_the_command_line_makes_of_its_name(name):
    from cluster.settings.hydra import compose

    (config,) = compose(["experiment=tiny", f"objective={name}"])
    assert bowstring.make_objective(name) == config.objective


def test_every_objective_has_its_name_and_takes_settings():
    assert all(bowstring.make_objective(name) == kind() for name, kind in OBJECTIVES.items())
    made = bowstring.make_objective("traflow", distance="l2")
    assert isinstance(made, DrawnConfig) and made.distance == "l2"


def test_a_student_by_name():
    image = bowstring.ImageSpec(1, 8, 10)
    student = bowstring.make_student(image, "dit_digits", depth=2)
    assert student.network.config.depth == 2 and student.network.config.width == 96


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (lambda: bowstring.make_objective("trafow"), "choose one of: ayf, bezier"),
        (lambda: bowstring.make_objective("traflow", distanc="l2"), "it has: name, distance"),
        (lambda: bowstring.load_teacher("ring8", gidance=2), "has no setting gidance"),
        (lambda: bowstring.load_teacher("ring8", kind="sith"), "none of: native, analytic"),
        (lambda: bowstring.load_teacher("nowhere/at.all"), "nowhere/at.all"),
        (lambda: bowstring.make_student(bowstring.load_teacher("ring8")), "name one, network="),
        (lambda: bowstring.make_trajectories([], 4), "needs at least one teacher"),
        (lambda: bowstring.make_trajectories(bowstring.load_teacher("ring8"), 4, 5), "multiple"),
        (lambda: bowstring.load_teacher("ring8").sample(4, nfe=3), "nfe=3 must be a multiple of 2"),
    ],
)
def test_a_mistake_is_a_sentence(work, sentence):
    with pytest.raises(bowstring.ConfigError, match=sentence):
        work()


def test_training_refuses_what_only_a_run_can(teacher, pairs):
    objective = bowstring.make_objective("endpoint")
    with pytest.raises(bowstring.ConfigError, match="is for a run"):
        bowstring.train(bowstring.make_student(teacher), pairs, objective, precision="bf16")
    other = bowstring.make_student(bowstring.ImageSpec(1, 4, 10), "dit_tiny")
    with pytest.raises(bowstring.ConfigError, match=r"of images \(1, 8, 8\)"):
        bowstring.train(other, pairs, objective)


def test_without_torch_the_sentence_says_which_extra():
    program = (
        "import sys\nsys.modules['torch'] = None\n"
        "try:\n    import bowstring\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "the package torch is missing; pip install 'bowstring[train]'\n"
