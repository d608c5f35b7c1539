"""Few-step sampling: exact for an exact map, the same picture for the same id."""

import itertools

import numpy as np
import pytest
import torch

from distill.config import ConfigError
from distill.export.student import export_run
from distill.flow.noise import sample_noise
from distill.report.pictures import GREY, tile
from distill.sample import few_step, load_student, sample_run, to_uint8
from distill.testing import GaussianFlow

FLOW = GaussianFlow(torch.linspace(-1, 1, 5, dtype=torch.float64), 0.4)


@pytest.mark.parametrize("nfe", [1, 2, 3, 8])
def test_exact_map_reaches_the_end_point_at_any_nfe(nfe):
    noise = torch.from_numpy(sample_noise(0, np.arange(64), (5,))).double()
    x = few_step(FLOW.student, noise, torch.full((64,), -1), nfe)
    assert torch.allclose(x, FLOW.map(noise, 0.0, 1.0), atol=1e-13)


@pytest.mark.parametrize(
    "times",
    [[0.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]],
    ids=lambda times: f"{len(times) - 1} NFE",
)
def test_few_step_calls_the_network_once_per_jump_between_the_samplers_times(times):
    calls = []

    def u(x, t, s, label):
        calls.append((t[0].item(), s[0].item()))
        return torch.zeros_like(x)

    few_step(u, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), len(times) - 1)
    assert calls == list(itertools.pairwise(times))


def test_pixels_cover_the_range_and_clip():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(5, 1, 1, 1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]


@pytest.fixture
def student(finished_run, tmp_path):
    return load_student(export_run(finished_run, tmp_path / "student"), "cpu")


def test_an_image_depends_on_seed_and_id_alone(student):
    images = student.sample(10, nfe=2, seed=3)
    assert images.shape == (10, 1, 8, 8) and images.dtype == torch.uint8
    few = student.sample(7, nfe=2, seed=3, batch_size=3).int()
    assert (few - images[:7].int()).abs().max() <= 1  # rounding of another batch split
    assert not torch.equal(images, student.sample(10, nfe=2, seed=4))


def test_labels_repeat_in_turn_and_matter(student):
    _, labels = student.sample_with_labels(5, labels=[3, 7])
    assert labels.tolist() == [3, 7, 3, 7, 3]
    assert not torch.equal(student.sample(2, labels=3), student.sample(2, labels=8))


@pytest.mark.parametrize("wrong", [{"labels": [10]}, {"labels": []}, {"nfe": 0}, {"num": 0}])
def test_wrong_settings_are_refused_by_name(student, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        student.sample(**({"num": 2} | wrong))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, lambda label: label])
def test_a_label_is_any_integer(student, kind):
    expected = student.sample(2, labels=[3, 7])
    assert torch.equal(student.sample(2, labels=[kind(3), kind(7)]), expected)
    assert torch.equal(student.sample(2, labels=kind(3)), student.sample(2, labels=3))
    assert torch.equal(student.sample(2, labels=np.array([3, 7])), expected)
    assert torch.equal(student.sample(2, labels=torch.tensor([3, 7])), expected)


@pytest.mark.parametrize("wrong", ["a red fox", 1.5, [True], torch.tensor([0.5])])
def test_a_label_that_is_no_integer_is_refused(student, wrong):
    with pytest.raises(ConfigError, match="takes classes, 0 to 9"):
        student.sample(2, labels=wrong)


def test_a_run_opens_as_its_newest_checkpoint_and_nothing_is_written(finished_run, student):
    before = sorted(finished_run.root.rglob("*"))
    opened = load_student(finished_run.root, "cpu")
    assert torch.equal(opened.sample(4, nfe=2), student.sample(4, nfe=2))
    assert opened.meta == student.meta and sorted(finished_run.root.rglob("*")) == before


def test_a_run_without_a_checkpoint_is_a_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="has no checkpoint yet; train it first"):
        load_student(tmp_path)


def test_a_teacher_is_no_student(finished_run):
    with pytest.raises(ConfigError, match="teacher"):
        load_student(finished_run.teacher.model(3))


def test_sample_run_writes_what_the_student_gives(finished_run, student, tmp_path):
    path = sample_run(finished_run, nfe=2, seed=5, labels=[1, 2], num=6, out=tmp_path)
    with np.load(path, allow_pickle=False) as archive:
        assert np.array_equal(archive["images"], student.sample(6, 2, 5, [1, 2]).numpy())
        assert archive["labels"].tolist() == [1, 2] * 3
        assert (archive["seed"], archive["nfe"]) == (5, 2)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_tile_puts_pictures_row_by_row_and_enlarges_by_whole_factors():
    images = np.stack([np.full((3, 8, 8), value, dtype=np.uint8) for value in (10, 20, 30)])
    grid = np.asarray(tile(images, columns=2))
    assert grid.shape == (130, 130, 3)
    assert [grid[0, 0, 0], grid[0, 129, 0], grid[129, 0, 0]] == [10, 20, 30]
    assert (grid[64:66] == GREY).all() and (grid[:, 64:66] == GREY).all()
    assert np.asarray(tile(images[:1], columns=1)).shape == (64, 64, 3)
