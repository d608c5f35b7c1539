"""Teachers: closed forms, guidance, and our own."""

import json
import math

import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.flow.solvers import solve
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.networks.files import fingerprint, save_model
from distill.teachers.analytic import MixtureTeacher, random_mixture, ring
from distill.teachers.base import Jumps, guided
from distill.teachers.build import build_field, build_teacher
from distill.teachers.config import TEACHERS, AnalyticConfig, NativeConfig, SiTConfig
from distill.testing import GaussianFlow, tiny_teacher

IMAGE = ImageSpec(2, 8, 3)
DIT = DiTConfig(patch_size=2, width=16, depth=2, num_heads=2)
CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -----------------------------------------------------------------------------------------------
# Analytic


def test_one_component_is_the_gaussian_flow():
    mean = draw(1, 2, 2, seed=1)
    teacher = MixtureTeacher(mean[None], torch.tensor([0.4]), torch.ones(1))
    x, t = draw(5, 1, 2, 2), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    flow = GaussianFlow(mean, float(torch.tensor(0.4)))
    velocity = teacher.velocity(x, t, torch.full((5,), -1))
    torch.testing.assert_close(velocity, flow.velocity(x, t), rtol=1e-12, atol=1e-12)


def test_gaussian_flow_helper_is_its_own_ode_and_its_own_student():
    flow, x = GaussianFlow(torch.tensor([0.5, -1.0]).double(), 0.3), draw(4, 2)
    t, s = torch.tensor([0.0, 0.1, 0.5, 0.6]).double(), torch.tensor([1.0, 0.1, 0.9, 0.7]).double()
    label = torch.full((4,), -1)
    jumped = x + (s - t)[:, None] * flow.student(x, t, s, label)
    torch.testing.assert_close(jumped, flow.map(x, t, s), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(flow.student(x, t, t, label), flow.velocity(x, t))
    h = 1e-5
    slope = (flow.map(x, t, t + h) - flow.map(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(slope, flow.velocity(x, t), rtol=0, atol=1e-8)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_mixture_velocity_is_that_of_its_score(t):
    """v = x/t + (1-t)/t grad log p_t, with p_t = sum_k pi_k N(t m_k, (1-t)^2 + t^2 c_k^2)."""
    teacher, x = random_mixture(6, 4), draw(7, 6).requires_grad_()
    variance = (1 - t) ** 2 + t**2 * teacher.stds**2
    square = (x[:, None] - t * teacher.means.flatten(1)).square().sum(-1)
    log_p = teacher.weights.log() - square / (2 * variance) - 3 * (2 * math.pi * variance).log()
    (score,) = torch.autograd.grad(log_p.logsumexp(dim=1).sum(), x)
    expected = (x + (1 - t) * score) / t
    times, label = torch.full((7,), t, dtype=torch.float64), torch.full((7,), -1)
    velocity = teacher.velocity(x.detach()[:, :, None, None], times, label).flatten(1)
    torch.testing.assert_close(velocity, expected.detach(), rtol=1e-9, atol=1e-9)


def test_mixture_starts_towards_the_mean_and_is_finite_at_the_end():
    teacher, x = random_mixture(), draw(3, 64, 1, 1)
    label = torch.full((3,), -1)
    mean = torch.einsum("k,kchw->chw", teacher.weights, teacher.means)
    torch.testing.assert_close(teacher.velocity(x, torch.zeros(3).double(), label), mean - x)
    assert teacher.velocity(x, torch.ones(3).double(), label).isfinite().all()


def test_ring_flow_ends_on_the_ring():
    teacher, noise = ring(), draw(400, 2, 1, 1)
    label = torch.full((400,), -1)
    end = solve(
        lambda x, t: teacher.velocity(x, t.expand(400), label),
        noise,
        torch.tensor([0.0, 1.0]),
        "rk4",
        64,
    )[-1]
    distance = torch.cdist(end.flatten(1), teacher.means.flatten(1)).min(dim=1).values
    # Rayleigh: the mean distance to the centre is std sqrt(pi / 2).
    assert abs(float(distance.mean()) / (0.15 * math.sqrt(math.pi / 2)) - 1) < 0.1


def test_class_is_component_and_none_is_all():
    conditional, whole = tiny_teacher(), tiny_teacher(conditional=False)
    x, t = draw(3, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    none = torch.full((3,), -1)
    assert (conditional.image.num_classes, whole.image.num_classes) == (3, 0)
    assert torch.equal(conditional.velocity(x, t, none), whole.velocity(x, t, none))
    for k in range(3):
        flow = GaussianFlow(conditional.means[k], float(conditional.stds[k]))
        velocity = conditional.velocity(x, t, torch.full((3,), k))
        torch.testing.assert_close(velocity, flow.velocity(x, t))


def test_mixture_samples_have_its_moments():
    teacher = ring()
    x = teacher.sample(
        draw(20_000, 2, 1, 1), torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    )
    # Variance per axis: radius^2 / 2 + std^2.
    torch.testing.assert_close(
        x.flatten(1).var(dim=0), torch.full((2,), 2.0225).double(), rtol=0.03, atol=0
    )


def test_analytic_from_file_and_preset(tmp_path):
    made = tiny_teacher()
    path = tmp_path / "mixture.json"
    content = {
        "shape": [1, 4, 4],
        "means": made.means.flatten(1).tolist(),
        "stds": made.stds.tolist(),
        "conditional": True,
    }
    path.write_text(json.dumps(content))
    teacher = build_teacher(AnalyticConfig(path=str(path)), CPU)
    assert teacher.fingerprint == made.fingerprint
    assert teacher.image == made.image
    assert build_teacher(AnalyticConfig(path="ring8"), CPU).image == ImageSpec(2, 1, 0)
    with pytest.raises(ConfigError, match="neither a file nor one of: ring8, mixture64"):
        build_teacher(AnalyticConfig(path="ring9"), CPU)
    path.write_text(json.dumps(content | {"stds": [1.0, 0.0, 1.0]}))
    with pytest.raises(ConfigError, match="std and a weight above 0"):
        build_teacher(AnalyticConfig(path=str(path)), CPU)
    path.write_text(json.dumps(content | {"shape": [1, 5, 5]}))
    with pytest.raises(ConfigError, match="does not describe a mixture"):
        build_teacher(AnalyticConfig(path=str(path)), CPU)


# -----------------------------------------------------------------------------------------------
# Guidance


def test_guidance_is_the_formula_in_one_doubled_batch():
    teacher = tiny_teacher()
    x, t = draw(3, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    label, none = torch.tensor([0, 2, -1]), torch.full((3,), -1)
    field = guided(teacher, 1.5)
    v_none, v_label = teacher.velocity(x, t, none), teacher.velocity(x, t, label)
    torch.testing.assert_close(field(x, t, label), v_none + 1.5 * (v_label - v_none))
    assert (field.evaluations, field.forwards) == (1, 2)


def test_guidance_of_one_costs_one_forward():
    teacher, (x, t) = tiny_teacher(), (draw(2, 1, 4, 4), torch.tensor([0.1, 0.5]).double())
    field = guided(teacher, 1.0)
    assert torch.equal(
        field(x, t, torch.tensor([0, 1])), teacher.velocity(x, t, torch.tensor([0, 1]))
    )
    assert (field.evaluations, field.forwards) == (1, 1)


def test_guidance_needs_classes():
    with pytest.raises(ConfigError, match=r"guidance=1.5 needs a teacher with classes"):
        guided(tiny_teacher(conditional=False), 1.5)


# -----------------------------------------------------------------------------------------------
# Native


def test_native_teacher_is_the_diagonal_of_its_network(tmp_path):
    network = build_network(DIT, IMAGE)
    state = {name: v + 0.1 * draw(*v.shape).float() for name, v in network.state_dict().items()}
    network.load_state_dict(state)
    save_model(tmp_path / "m", state, DIT, IMAGE, {})
    teacher = build_teacher(NativeConfig(path=str(tmp_path / "m")), CPU)
    x, t, label = draw(2, *IMAGE.shape).float(), torch.tensor([0.2, 0.8]), torch.tensor([-1, 2])
    assert torch.equal(teacher.velocity(x, t, label), network(x, t, t, label))
    assert teacher.fingerprint == fingerprint(tmp_path / "m" / "model.safetensors")
    assert not teacher.velocity(x, t, label).requires_grad


def student_folder(folder, image=IMAGE):
    """A model folder of a student of which no weight is zero."""
    network = build_network(DIT, image)
    state = {name: v + 0.1 * draw(*v.shape).float() for name, v in network.state_dict().items()}
    save_model(folder, state, DIT, image, {"kind": "student"})
    return str(folder)


def test_a_student_jumps_by_its_own_map_and_counts_each_jump_once(tmp_path):
    config = NativeConfig(path=student_folder(tmp_path / "m"), solver="jumps", steps=4)
    teacher = build_teacher(config, CPU)
    field = build_field(teacher, config)
    assert isinstance(field, Jumps)
    x, t, s = draw(2, *IMAGE.shape).float(), torch.tensor([0.2, 0.5]), torch.tensor([0.9, 0.5])
    label = torch.tensor([-1, 2])
    u = field.mean_velocity(x, t, s, label)
    assert torch.equal(u, teacher.network(x, t, s, label))
    assert not u.requires_grad
    assert torch.equal(u[1], field(x, t, label)[1])  # the diagonal is the velocity
    assert not torch.equal(u[0], field(x, t, label)[0])
    assert (field.evaluations, field.forwards) == (3, 3)


def test_guidance_of_a_student_is_refused_where_it_has_classes(tmp_path):
    path = student_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"the student .* set teacher.NAME.guidance=1"):
        build_teacher(NativeConfig(path=path, guidance=1.5), CPU)
    for solver in ("heun", "jumps"):
        assert build_teacher(NativeConfig(path=path, solver=solver), CPU).is_student
    bare = student_folder(tmp_path / "bare", ImageSpec(2, 8, 0))
    with pytest.raises(ConfigError, match="needs a teacher with classes"):
        guided(build_teacher(NativeConfig(path=bare, guidance=1.5), CPU), 1.5)


def test_only_a_student_jumps():
    for kind in TEACHERS.values():
        for guidance in (1.0, 1.5):
            if kind.is_from_run and guidance == 1:
                continue
            with pytest.raises(ConfigError, match=r"solver=jumps .* only a student jumps"):
                kind(solver="jumps", guidance=guidance)


def test_a_teacher_needs_a_path():
    with pytest.raises(ConfigError, match=r"teacher.path is empty; teacher.kind=sit needs one"):
        build_teacher(SiTConfig(), CPU)
