"""Evaluation: a student that is its teacher is Euler; nothing depends on the batch."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.progress import Progress

from distill.config import ConfigError
from distill.datasets.config import DataConfig
from distill.evaluation.config import EvalConfig
from distill.evaluation.evaluate import Evaluator, evaluate
from distill.evaluation.metrics import relative_distance
from distill.evaluation.sampling import Interrupt, Samples, draw, teacher_sampler
from distill.flow.noise import sample_noise
from distill.run.measured import Cost, read_results
from distill.testing import GaussianFlow

FLOW = GaussianFlow(torch.tensor([0.5, -0.5], dtype=torch.float64), 0.4)


def gaussian_velocity(x, t, label):
    return FLOW.velocity(x, t)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_distance_of_a_solver_falls_with_twice_its_order(solver, order):
    noise = torch.from_numpy(sample_noise(1, np.arange(200), (2,))).double()
    labels = torch.full((200,), -1)
    end = FLOW.map(noise, 0.0, 1.0)
    distances = [
        relative_distance(teacher_sampler(gaussian_velocity, solver, n)(noise, labels), end, noise)
        for n in (64, 128)
    ]
    assert np.log2(distances[0] / distances[1]) == pytest.approx(2 * order, abs=0.3)


def test_draw_is_the_same_for_every_batch_size():
    noise = torch.from_numpy(sample_noise(1, np.arange(50), (2,)))
    samples = Samples(noise, torch.full((50,), -1))
    sampler = teacher_sampler(gaussian_velocity, "euler", 4)
    whole, _ = draw(sampler, samples, 50, torch.device("cpu"), Interrupt())
    parts, _ = draw(sampler, samples, 7, torch.device("cpu"), Interrupt())
    assert torch.allclose(whole, parts, atol=1e-6)


def test_an_interrupted_drawing_ends_at_the_next_evaluation():
    # Batch 0 is there at once and its arrival interrupts; each other one would take 50 seconds.
    noise = torch.arange(8.0)[:, None].expand(8, 2)
    samples, interrupt = Samples(noise, torch.full((8,), -1)), Interrupt()

    def slow(x, t, label):
        time.sleep(0.05)
        return x

    def sampler(noise, labels):
        is_first = bool(noise[0, 0] == 0)
        watched = interrupt.watch(slow)
        return noise if is_first else teacher_sampler(watched, "euler", 1000)(noise, labels)

    def arrived(num):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        draw(sampler, samples, 1, torch.device("cpu"), interrupt, arrived)
    assert time.monotonic() - started < 5


def settings(**changes):
    values = {"num_samples": 600, "batch_size": 300, "nfe": [1, 2, 4], "teacher_nfe": [1, 2, 4, 16]}
    values["euler_nfe"] = [1, 2, 4]
    return EvalConfig(**(values | {"reference_steps": 8} | changes))


@pytest.fixture(scope="module")
def results(finished_run, data, teachers):
    return evaluate(finished_run, data, teachers, settings(), "traflow", "cpu")


def without_time(rows):
    return [replace(row, seconds_per_1000=0.0) for row in rows]


def test_a_student_that_is_its_teacher_lies_on_the_euler_curve(results):
    euler = {row.nfe: row for row in results.teacher if row.solver == "euler"}
    even = [row for row in results.student if row.nfe != 2]  # two jumps meet at 3/4
    assert [row.nfe for row in even] == [1, 4]
    for row in even:
        twin = euler[row.nfe]
        assert row.distance_to_teacher == pytest.approx(twin.distance_to_teacher, rel=1e-4)
        assert row.frechet == pytest.approx(twin.frechet, rel=1e-3)
    assert euler[4].distance_to_teacher < euler[1].distance_to_teacher


def test_every_number_says_what_it_is_of(results, finished_run):
    assert read_results(finished_run) == results
    assert (results.n, results.seed, results.labels) == (600, 12345, "data")
    assert [(row.solver, row.nfe) for row in results.teacher] == [
        ("heun", 2),
        ("heun", 4),
        ("heun", 16),
        ("euler", 1),
        ("euler", 2),
        ("euler", 4),
    ]
    # the fine solution is a row of its own: the quality of the teacher at its best
    assert results.truth.nfe == results.teacher[2].nfe == 16
    assert results.teacher[2].distance_to_teacher == 0
    assert results.reference.n == 1797
    assert len(results.extractor.sha256) == len(results.reference.sha256) == 64
    assert "FID" not in results.frechet_name
    assert results.cost == Cost(
        teacher_device_s=2.0, train_device_s=20.0, teacher_nfe=512, bytes=1000
    )


def test_evaluation_repeats_and_does_not_depend_on_the_batch(finished_run, data, teachers):
    def measure(batch_size):
        few = settings(batch_size=batch_size, nfe=[2], teacher_nfe=[2], euler_nfe=[2])
        return evaluate(finished_run, data, teachers, few, "traflow", "cpu")

    first, again, split = measure(300), measure(300), measure(91)
    rows = [found.student + found.teacher for found in (first, again, split)]
    assert without_time(rows[1]) == without_time(rows[0])
    for row, other in zip(rows[2], rows[0], strict=True):
        assert row.distance_to_teacher == pytest.approx(other.distance_to_teacher, rel=1e-4)
        assert row.frechet == pytest.approx(other.frechet, rel=1e-3)


def test_without_a_terminal_it_says_a_line_now_and_then(
    finished_run, data, teachers, monkeypatch, capsys
):
    monkeypatch.setattr("distill.evaluation.evaluate.LINE_PERIOD_S", 0.0)
    evaluate(finished_run, data, teachers, settings(), "traflow", "cpu")
    said = capsys.readouterr().err
    num = settings().num_samples
    assert f"evaluation, teacher, fine solution: {num}/{num} samples\n" in said


def test_pictures_share_noise_and_label_down_the_columns(results, finished_run):
    with np.load(finished_run.samples / "grid.npz", allow_pickle=False) as grid:
        rows = grid["rows"].tolist()
        images = dict(zip(rows, grid["images"].astype(int), strict=True))
        assert grid["labels"].tolist() == list(range(10))
    assert rows[0] == "teacher,heun,64"
    # this student is Euler on its teacher, so their pictures are the same
    assert abs(images["student,jumps,4"] - images["teacher,euler,4"]).max() <= 1


def test_the_seed_of_the_run_is_refused(finished_run, data, teachers):
    with pytest.raises(ConfigError, match=r"eval\.seed=0"):
        evaluate(finished_run, data, teachers, settings(seed=0), "traflow", "cpu")


def test_a_perfect_model_of_uneven_classes_is_near_its_data(tmp_path):
    """It draws the images of each class exactly; nine of ten are of class 0."""
    rng = np.random.default_rng(0)
    labels = (np.arange(2000) % 10 == 0).astype(np.int64)
    pixels = np.clip(
        64 + 128 * labels[:, None, None, None] + rng.normal(0, 9, (2000, 1, 2, 2)), 0, 255
    )
    np.savez(tmp_path / "d.npz", images=pixels.astype(np.uint8), labels=labels)
    data = DataConfig(name="npz", path=str(tmp_path / "d.npz"), channels=1, size=2, num_classes=2)

    def perfect(noise, label):
        return ((64 + 128 * label[:, None, None, None] + 9 * noise) / 127.5) - 1

    found = {}
    for kind in ("data", "uniform"):
        evaluation = EvalConfig(num_samples=2000, labels=kind)
        evaluator = Evaluator(data, evaluation, torch.device("cpu"), Progress(disable=True))
        evaluator.set_reference(perfect)
        assert evaluator.labels == kind
        found[kind] = evaluator.row(None, "perfect", 1).frechet
    assert found["data"] < 1e-3 and found["uniform"] > 100 * found["data"]


def test_without_real_images_classes_are_drawn_alike():
    data = DataConfig(name="latents", channels=4, size=8, num_classes=3)
    evaluator = Evaluator(
        data, EvalConfig(num_samples=9), torch.device("cpu"), Progress(disable=True)
    )
    assert evaluator.labels == "uniform"


def test_trajectories_of_less_than_float32_say_how_far_they_are(finished_run, data, teachers):
    """The reference is the teacher in float32 all the same."""
    few = settings(num_samples=100, batch_size=50, nfe=[1], teacher_nfe=[2], euler_nfe=[2])
    coarse = {name: replace(teacher, precision="bf16") for name, teacher in teachers.items()}
    plain = evaluate(finished_run, data, teachers, few, "traflow", "cpu")
    found = evaluate(finished_run, data, coarse, few, "traflow", "cpu")
    assert (plain.truth.precision, plain.truth.distance) == ("fp32", None)
    assert without_time(found.student) == without_time(plain.student)
    truth = found.truth
    assert truth.precision == "bf16" and 0 < truth.distance < 0.1
    assert truth.distance != truth.distance_in_fp32
