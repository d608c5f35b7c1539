"""Export: the evaluation average, bit for bit, with where it comes from."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.checkpoint import commit as checkpoint
from distill.checkpoint.manifest import MANIFEST, SEAL, latest_verified
from distill.config import ConfigError, ImageSpec, LossyExport, TrainConfig
from distill.engine.engine import TorchEngine
from distill.export import student as exports
from distill.export.student import export_run, latest_student
from distill.flow.noise import sample_labels, sample_noise
from distill.networks import files
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.networks.dit import grid_embedding
from distill.run.files import RunDir, write_json
from distill.run.identity import record_of
from distill.sample import few_step, load_student, to_uint8
from distill.teachers.build import build_teacher, start_of
from distill.teachers.config import SiTConfig
from distill.testing import write_tiny_record


def test_export_holds_the_evaluation_average_bit_for_bit(finished_run, tmp_path):
    student = load_student(export_run(finished_run, tmp_path / "out"), "cpu")
    _, folder = latest_verified(finished_run.checkpoints)
    state = student.network.state_dict()
    for name, value in checkpoint.read_average(folder, "evaluation").items():
        assert torch.equal(state[name], value), name


def test_two_exports_give_the_same_images(finished_run, tmp_path):
    first = load_student(export_run(finished_run, tmp_path / "a"), "cpu")
    second = load_student(export_run(finished_run, tmp_path / "b"), "cpu")
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    a, b = (few_step(s.network, noise, labels, 2) for s in (first, second))
    assert torch.equal(a, b)
    assert torch.equal(first.sample(4, nfe=2), second.sample(4, nfe=2))


def test_model_json_says_where_the_model_comes_from(finished_run, tmp_path):
    folder = export_run(finished_run, tmp_path / "out")
    meta = json.loads((folder / "model.json").read_text())["meta"]
    assert meta == {
        "kind": "student",
        "objective": "traflow",
        "middle": 0.5,
        "step": 20,
        "run": "tiny",
        "config_sha256": record_of(finished_run).hash,
        "teachers": {"tiny": "cd" * 32},
    }


def test_a_student_of_version_0_1_keeps_the_times_it_was_drilled_on(finished_run, tmp_path):
    """0, 3/4, 1 for two jumps; its model.json says nothing of them."""
    folder = export_run(finished_run, tmp_path / "out")
    content = json.loads((folder / "model.json").read_text())
    assert load_student(folder, "cpu").middle == content["meta"].pop("middle") == 0.5
    (folder / "model.json").write_text(json.dumps(content))
    student, noise, labels = load_student(folder, "cpu"), torch.randn(4, 1, 8, 8), torch.arange(4)
    assert student.middle == 0.75
    found, late, even = (
        student.sample(4, nfe=2),
        *(few_step(student.network, noise, labels, 2, middle) for middle in (0.75, 0.5)),
    )
    assert not torch.equal(late, even)
    drawn = torch.from_numpy(sample_noise(0, np.arange(4), (1, 8, 8)))
    classes = torch.from_numpy(sample_labels(0, np.arange(4), 10))
    assert torch.equal(found, to_uint8(few_step(student.network, drawn, classes, 2, 0.75)))


def test_latest_student_exports_once(finished_run):
    folder = latest_student(finished_run)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert latest_student(finished_run) == folder == finished_run.model(20)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_without_checkpoints_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        export_run(RunDir(tmp_path / "empty"), tmp_path / "out")


# -----------------------------------------------------------------------------------------------
# What is not trained

SIT = DiTConfig(patch_size=2, width=32, depth=1, num_heads=2)
LATENT = ImageSpec(4, 16, 10)
LOW = grid_embedding(32, 4).reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
TABLES = {
    "constructor": grid_embedding(32, 8),
    "interpolated": F.interpolate(LOW, scale_factor=2, mode="bicubic").flatten(2).mT,
    "learned": grid_embedding(32, 8) + 0.3 * torch.randn(1, 64, 32, generator=torch.manual_seed(1)),
}


def sit_run(root, table, move=lambda network: None) -> tuple[RunDir, SiTConfig, TorchEngine]:
    """A run whose student began as a SiT with the positions `table`; not one step was taken."""
    state = build_network(SIT, LATENT).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
        if not name.startswith("s_embedder")
    }
    root.mkdir()
    torch.save({"ema": state | {"pos_embed": table}}, root / "sit.pt")
    teacher = SiTConfig(path=str(root / "sit.pt"), num_heads=2)
    network = files.with_weights_of(start_of(teacher), SIT, LATENT)
    move(network)
    engine, run = TorchEngine(network, TrainConfig(), torch.device("cpu")), RunDir(root / "run")
    snapshot = checkpoint.take_snapshot(1, engine, {"seed": 0})
    checkpoint.commit(run.checkpoints, snapshot, engine, keep_last=2)
    identity = {
        "student": asdict(SIT),
        "data": {"name": "latents", **asdict(LATENT)},
        "objective": {"name": "traflow"},
        "teacher": {"sit": asdict(teacher)},
    }
    write_tiny_record(run, identity, sit="ab" * 32)
    return run, teacher, engine


def same_velocity(network, velocity) -> bool:
    x, t = torch.randn(4, 4, 16, 16), torch.rand(4)
    label = torch.arange(4)
    return torch.equal(network(x, t, t, label), velocity(x, t, label))


@pytest.mark.parametrize("table", TABLES)
def test_positions_that_came_with_the_teacher_come_out_again(tmp_path, table):
    run, teacher, _ = sit_run(tmp_path / "a", TABLES[table])
    network = load_student(export_run(run, tmp_path / "out"), "cpu").network
    assert torch.equal(network.get_buffer("pos_embed"), TABLES[table])
    assert same_velocity(network, build_teacher(teacher, "cpu").velocity)


def test_what_was_frozen_in_training_comes_out_too(tmp_path):
    def freeze(network):
        network.blocks.requires_grad_(False)

    run, teacher, engine = sit_run(tmp_path / "a", TABLES["learned"], freeze)
    assert "blocks.0.attn.qkv.weight" in engine.fixed
    network = load_student(export_run(run, tmp_path / "out"), "cpu").network
    assert same_velocity(network, build_teacher(teacher, "cpu").velocity)


def forget_fixed(run: RunDir) -> None:
    """The run as a version before this wrote it: the manifest knows trained parameters alone."""
    path = run.checkpoints / "step_00000001" / MANIFEST
    content = json.loads(path.read_text())
    del content["fixed"], content[SEAL]
    write_json(path, content)


def test_an_older_checkpoint_takes_them_from_its_teacher_or_says_that_it_is_gone(tmp_path):
    run, teacher, _ = sit_run(tmp_path / "a", TABLES["learned"])
    forget_fixed(run)
    network = load_student(export_run(run, tmp_path / "out"), "cpu").network
    assert same_velocity(network, build_teacher(teacher, "cpu").velocity)
    (tmp_path / "a/sit.pt").unlink()
    with pytest.raises(ConfigError, match=r"did not save fixed tensors.*sit.pt is missing.*put it"):
        export_run(run, tmp_path / "other")


def test_an_export_of_an_older_version_is_made_again_once(tmp_path):
    run, teacher, _ = sit_run(tmp_path / "a", TABLES["learned"])
    lossy = build_network(SIT, LATENT).state_dict() | checkpoint.read_average(
        run.checkpoints / "step_00000001", "evaluation"
    )
    files.save_model(run.model(1), lossy, SIT, LATENT, {"kind": "student"})
    path = run.model(1) / files.DESCRIPTION
    description = json.loads(path.read_text())
    del description["bowstring"]
    write_json(path, description)
    network = load_student(latest_student(run), "cpu").network
    assert same_velocity(network, build_teacher(teacher, "cpu").velocity)
    before = path.stat().st_mtime_ns
    assert latest_student(run) == run.model(1) and path.stat().st_mtime_ns == before


def test_an_export_that_lost_something_is_refused_and_leaves_nothing(
    finished_run, tmp_path, monkeypatch
):
    whole = files.load_model

    def rounded(folder, device):
        network, meta = whole(folder, device)
        return network.half().float(), meta

    def other_heads(folder, device):
        network, meta = whole(folder, device)
        network.get_submodule("blocks.0.attn").num_heads = 1
        return network, meta

    for opened, said in ((rounded, "is not as it was trained"), (other_heads, r"off by \d")):
        monkeypatch.setattr(exports.files, "load_model", opened)
        with pytest.raises(LossyExport, match=said):
            export_run(finished_run, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_a_damaged_newest_checkpoint_is_named(tmp_path, capsys):
    run, _, engine = sit_run(tmp_path / "a", TABLES["constructor"])
    snapshot = checkpoint.take_snapshot(2, engine, {"seed": 0})
    checkpoint.commit(run.checkpoints, snapshot, engine, keep_last=2)
    assert load_student(export_run(run, tmp_path / "good"), "cpu").meta["step"] == 2
    assert capsys.readouterr().err == ""
    (run.checkpoints / "step_00000002/rank_00000.safetensors").write_bytes(b"cut")
    assert load_student(export_run(run, tmp_path / "older"), "cpu").meta["step"] == 1
    assert "step_00000002 is damaged; step 1 is taken" in capsys.readouterr().err
