"""Generated shards: pure functions of (seed, shard, teachers, solver, grid)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.data.config import TrajectoryConfig
from distill.data.generate import generate_shard
from distill.flow.noise import sample_labels, sample_noise
from distill.flow.paths import jump
from distill.flow.solvers import solve
from distill.networks.files import save_model
from distill.sample import few_step
from distill.teachers.build import build_teacher
from distill.teachers.config import AnalyticConfig, NativeConfig
from distill.testing import FaultInjector, GaussianFlow, random_network, tiny_teacher

TRAJECTORY = TrajectoryConfig(grid=4, samples_per_shard=10, batch_size=4, block_shards=1)
CONFIG = AnalyticConfig(path="-", solver="heun", steps=16)


def generate(shard=2, seed=5, trajectory=TRAJECTORY, config=CONFIG, teacher=None, **options):
    teachers = {"only": teacher or tiny_teacher()}
    return generate_shard(teachers, {"only": config}, trajectory, seed, shard, "cpu", **options)


def test_a_shard_is_its_ids_noise_and_labels():
    shard = generate()
    assert shard.ids.tolist() == list(range(20, 30))
    assert shard.states.shape == (10, 1, 5, 1, 4, 4)
    assert shard.states.dtype == torch.float32
    noise = sample_noise(5, shard.ids, (1, 4, 4))
    assert (shard.states[:, 0, 0].numpy() == noise).all()
    assert (shard.labels == sample_labels(5, shard.ids, 3)).all()


def test_twice_is_bit_identical_and_other_seeds_and_shards_differ():
    first = generate()
    assert torch.equal(first.states, generate().states)
    assert not torch.equal(first.states, generate(seed=6).states)
    assert not torch.equal(first.states, generate(shard=3).states)


def test_states_do_not_depend_on_the_shard_size():
    wide = TrajectoryConfig(grid=4, samples_per_shard=30, batch_size=4, block_shards=1)
    whole = generate(shard=0, trajectory=wide)
    torch.testing.assert_close(whole.states[20:], generate().states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("points", [[0, 4], [0, 1, 4], [0, 2, 3, 4]])
def test_the_stored_points_are_those_of_the_whole_grid_bit_for_bit(points):
    some = replace(TRAJECTORY, store_points=points)
    assert torch.equal(generate(trajectory=some).states, generate().states[:, :, points])


@pytest.mark.parametrize("points", [[], [0, 1, 4]])
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_stored_velocities_are_the_teachers_at_the_stored_states(solver, points):
    """States and noise stay, bit for bit; the solver has all velocities but that at t = 1."""
    config = replace(CONFIG, solver=solver)
    trajectory = replace(TRAJECTORY, store_points=points, store_velocity=True)
    shard = generate(trajectory=trajectory, config=config)
    plain = generate(trajectory=replace(TRAJECTORY, store_points=points), config=config)
    assert torch.equal(shard.states, plain.states) and plain.velocities is None
    assert (shard.nfe, shard.forwards) == (plain.nfe + 10, plain.forwards + 10)
    teacher, label = tiny_teacher(), torch.from_numpy(shard.labels)
    for k, point in enumerate(trajectory.points):
        t = torch.full((10,), point / 4)
        expected = teacher.velocity(shard.states[:, 0, k], t, label)
        torch.testing.assert_close(shard.velocities[:, 0, k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("points", [[0], [4], [1, 4], [0, 3], [0, 2, 2, 4], [0, 3, 1, 4], [-1, 4]])
def test_stored_points_go_from_noise_to_image(points):
    with pytest.raises(ConfigError, match=r"trajectory.store_points=.* must rise from 0"):
        replace(TRAJECTORY, store_points=points)


def test_states_follow_the_flow_of_the_class():
    teacher = tiny_teacher()
    shard = generate(config=AnalyticConfig(path="-", solver="rk4", steps=64))
    for states, label in zip(shard.states[:, 0], shard.labels, strict=True):
        flow = GaussianFlow(teacher.means[label].float(), float(teacher.stds[label]))
        for index, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
            exact = flow.map(states[:1], 0.0, t)[0]
            torch.testing.assert_close(states[index], exact, rtol=0, atol=2e-4)


def test_teachers_share_noise_and_labels():
    teachers = {"weak": tiny_teacher(), "best": tiny_teacher()}
    weak = AnalyticConfig(path="-", solver="euler", steps=4)
    shard = generate_shard(teachers, {"weak": weak, "best": CONFIG}, TRAJECTORY, 5, 2, "cpu")
    assert torch.equal(shard.states[:, 0, 0], shard.states[:, 1, 0])
    assert torch.equal(shard.states[:, 1], generate().states[:, 0])
    assert (shard.states[:, 0, -1] - shard.states[:, 1, -1]).abs().max() > 1e-3
    # 10 samples x (4 Euler steps + 16 Heun steps of 2)
    assert (shard.nfe, shard.forwards) == (10 * (4 + 32), 10 * (4 + 32))


def test_guidance_is_counted_as_one_evaluation_and_two_forwards():
    config = AnalyticConfig(path="-", solver="heun", steps=16, guidance=1.5)
    shard = generate(config=config)
    assert (shard.nfe, shard.forwards) == (10 * 32, 2 * 10 * 32)
    assert not torch.equal(shard.states, generate().states)


def test_unconditional_labels_are_none():
    shard = generate(teacher=tiny_teacher(conditional=False))
    assert (shard.labels == np.full(10, -1)).all()


# -----------------------------------------------------------------------------------------------
# Students as teachers


@pytest.fixture
def student(tmp_path):
    """A student whose map and whose field differ."""
    network, image = random_network("dit", ImageSpec(1, 4, 3)).float(), ImageSpec(1, 4, 3)
    save_model(tmp_path / "m", network.state_dict(), network.config, image, {"kind": "student"})
    return NativeConfig(path=str(tmp_path / "m"), steps=8, solver="jumps")


def test_states_of_a_student_are_its_jumps_on_its_own_grid_and_on_a_coarser_one(student):
    teacher = build_teacher(student, "cpu")
    fine = replace(TRAJECTORY, grid=8)
    coarse, whole = (
        generate(config=student, teacher=teacher, trajectory=some) for some in (TRAJECTORY, fine)
    )
    noise, label = whole.states[:, 0, 0], torch.from_numpy(whole.labels)
    end = few_step(teacher.network, noise, label, 8)
    torch.testing.assert_close(whole.states[:, 0, -1], end, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coarse.states, whole.states[:, :, ::2], rtol=1e-5, atol=1e-5)
    assert (coarse.nfe, coarse.forwards) == (10 * 8, 10 * 8)  # steps are jumps, one NFE each
    x = whole.states[:, 0, 2]
    t, s = torch.full((10,), 0.25), torch.full((10,), 0.375)
    landed = jump(teacher.network, x, t, s, label)
    torch.testing.assert_close(whole.states[:, 0, 3], landed, rtol=1e-4, atol=1e-4)


def test_a_grid_finer_than_the_jumps_is_refused(student):
    with pytest.raises(ConfigError, match=r"steps=8 must be a multiple of trajectory.grid=16"):
        teacher = build_teacher(student, "cpu")
        generate(config=student, teacher=teacher, trajectory=replace(TRAJECTORY, grid=16))


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_states_of_a_reflowed_student_follow_its_field(student, solver):
    config = replace(student, solver=solver)
    teacher = build_teacher(config, "cpu")
    shard = generate(config=config, teacher=teacher)
    label = torch.from_numpy(shard.labels)

    def field(x, t):
        times = t.expand(len(x))
        return teacher.network(x, times, times, label)

    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    states = solve(field, shard.states[:, 0, 0], times, solver, 2).transpose(0, 1)
    torch.testing.assert_close(shard.states[:, 0], states, rtol=1e-4, atol=1e-4)


def test_a_heartbeat_comes_with_every_jump(student):
    beats, teacher = [], build_teacher(student, "cpu")
    generate(config=student, teacher=teacher, beat=lambda: beats.append(1))
    assert len(beats) == 8 * 3  # 10 samples in 3 batches


# -----------------------------------------------------------------------------------------------
# Heartbeats and refusals


def test_a_heartbeat_comes_with_every_evaluation_and_can_stop_the_work():
    beats = []
    shard = generate(beat=lambda: beats.append(1))
    assert len(beats) == 3 * shard.nfe // 10  # 10 samples in 3 batches
    stop = FaultInjector(lambda: None, at=5, error=InterruptedError("lease lost"))
    with pytest.raises(InterruptedError, match="lease lost"):
        generate(beat=stop)
    assert stop.count == 1


def test_bad_settings_get_a_sentence():
    with pytest.raises(
        ConfigError, match=r"steps=10 must be a multiple of trajectory.grid=4; try 8"
    ):
        generate(config=AnalyticConfig(path="-", steps=10))
    teachers = {"a": tiny_teacher(4), "b": tiny_teacher(8)}
    with pytest.raises(ConfigError, match=r"teacher.b works on .* they must agree"):
        generate_shard(teachers, {"a": CONFIG, "b": CONFIG}, TRAJECTORY, 0, 0, "cpu")


def test_values_that_are_not_finite_are_refused_with_their_ids():
    teacher = tiny_teacher()
    teacher.means[1] = torch.nan
    with pytest.raises(ConfigError, match=r"teacher only gives values .* sample ids \[2"):
        generate(teacher=teacher)
