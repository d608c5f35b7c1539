"""Exports in the middle of a training, and where the first weights come from."""

import shutil
import time

import pytest
import torch

from cluster.plan.estimate import estimate
from cluster.settings.hydra import compose
from cluster.trainer.job import TrainJob
from cluster.trainer.rank import flops_of, initial_network, resume
from cluster.trainer.sources import Source
from distill.checkpoint import commit as checkpoint, manifest
from distill.config import ConfigError
from distill.datasets.images import ImageStream, open_images
from distill.engine.engine import TorchEngine
from distill.networks.files import load_model
from distill.run.files import read_lines, sha256_file
from distill.training import saving


def job_in(folder, *overrides):
    (config,) = compose(["experiment=tiny", f"run.dir={folder}", *overrides])
    return TrainJob("pretrain", config, None, folder / "scratch", "hash")


def run(job, stop_at=None):
    """One process trains the tiny teacher; its engine."""
    network, _ = initial_network(job)
    engine = TorchEngine(network, job.train, torch.device("cpu"))
    images = open_images(job.config.data)
    stream = ImageStream(images, job.config.seed, job.train.batch_size, 0, 1, 0.1)
    seen = []
    read = stream.read
    stream.read = lambda step: seen.append(step) or read(step)
    source = Source(stream, lambda: None)
    done = resume(job, engine, source, lambda: stop_at is not None and seen[-1] + 1 >= stop_at)
    return engine, done, seen


def weights(engine):
    return torch.cat([f.data for f in engine.fragments() if f.kind == "master"])


def test_an_export_on_the_way_changes_nothing(tmp_path):
    with_export = job_in(tmp_path / "a", "pretrain.export_steps=[2]")
    plain = job_in(tmp_path / "b", "pretrain.export_steps=[]")
    assert (with_export.exports, plain.exports) == ([2, 4], [4])
    first, done, seen = run(with_export)
    second, _, _ = run(plain)
    assert (done, seen) == (4, [0, 1, 2, 3])
    assert torch.equal(weights(first), weights(second))
    late = [load_model(job.run.model(4), "cpu")[0].state_dict() for job in (with_export, plain)]
    early = load_model(with_export.run.model(2), "cpu")[0].state_dict()
    assert all(torch.equal(late[0][name], late[1][name]) for name in early)
    assert any(not torch.equal(late[0][name], early[name]) for name in early)


def test_an_export_is_no_stop_and_what_it_takes_belongs_to_no_window(tmp_path, monkeypatch):
    job = job_in(tmp_path, "pretrain.export_steps=[2]", "pretrain.train.log_every=1")
    real = saving.export_checkpoint
    monkeypatch.setattr(saving, "export_checkpoint", lambda *args: time.sleep(0.5) or real(*args))
    run(job)
    kinds = [event["kind"] for event in read_lines(job.run.events)]
    assert kinds == ["resume", "steps", "steps", "save", "steps", "steps", "save"]
    assert all(line["step_s"] < 0.5 for line in read_lines(job.run.metrics))


def test_an_export_waits_for_the_save_in_the_background(tmp_path, monkeypatch):
    plain = job_in(tmp_path / "plain", "pretrain.export_steps=[2]")
    slow = job_in(tmp_path / "slow", "pretrain.export_steps=[2]", "pretrain.train.save_async=true")
    run(plain)
    real = checkpoint.commit
    monkeypatch.setattr(checkpoint, "commit", lambda *args: time.sleep(0.3) or real(*args))
    run(slow)
    for step in (2, 4):
        files = [job.run.model(step) / "model.safetensors" for job in (plain, slow)]
        assert sha256_file(files[0]) == sha256_file(files[1])


def test_a_stop_saves_and_the_next_start_goes_on(tmp_path):
    job = job_in(tmp_path, "pretrain.export_steps=[2]")
    assert run(job, stop_at=1)[1:] == (1, [0])
    assert run(job)[1:] == (4, [1, 2, 3])


def test_a_start_reads_the_checkpoint_once(tmp_path, monkeypatch):
    """Before it is loaded. What the start itself saves is read once too."""
    job = job_in(tmp_path, "pretrain.export_steps=[]")
    run(job, stop_at=2)
    read = []
    monkeypatch.setattr(
        manifest.files, "sha256_file", lambda path: read.append(path) or sha256_file(path)
    )
    assert run(job)[1:] == (4, [2, 3])
    read = [path.parent.name for path in read if path.name != manifest.MANIFEST]
    assert read == ["step_00000002", "step_00000004"]


def test_a_kill_between_save_and_export_costs_no_training(tmp_path):
    job = job_in(tmp_path)
    run(job)
    shutil.rmtree(job.run.model(4))
    assert run(job)[1:] == (4, [])
    assert job.run.model(4).is_dir()


def test_a_kill_between_save_and_export_costs_no_early_model(tmp_path):
    job = job_in(tmp_path, "pretrain.export_steps=[2]")
    run(job, stop_at=2)
    shutil.rmtree(job.run.model(2))
    assert run(job)[1:] == (4, [2, 3])
    assert job.run.model(2).is_dir() and job.run.model(4).is_dir()


def test_an_early_model_that_is_gone_is_named(tmp_path):
    job = job_in(tmp_path, "pretrain.export_steps=[2]")
    run(job)
    shutil.rmtree(job.run.model(2))
    with pytest.raises(ConfigError, match="step_00000002 is missing"):
        run(job)


def test_a_student_starts_as_its_teacher(tmp_path):
    job = job_in(tmp_path)
    run(job)
    student, origin = initial_network(TrainJob("train", job.config, None, tmp_path, "hash"))
    teacher, _ = load_model(job.run.model(4), "cpu")
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    label = torch.tensor([0, 4, -1])
    assert origin == "teacher.pretrained"
    assert torch.equal(student(x, t, t, label), teacher(x, t, t, label))


def test_a_student_of_another_shape_starts_fresh_and_says_so(tmp_path):
    job = job_in(tmp_path)
    run(job)
    job.config.student.depth = 2
    _, origin = initial_network(TrainJob("train", job.config, None, tmp_path, "hash"))
    assert origin == "fresh: teacher.pretrained has another architecture than the student"


def test_the_flops_of_a_step_are_those_of_the_estimate(tmp_path):
    job = job_in(tmp_path, "train.batch_size=32", "cluster.device_peak_flops=3e9")
    found = estimate(job.config, None)["formula"]["flops"]
    for stage, settings in (("pretrain", job.config.pretrain.train), ("train", job.config.train)):
        flops = flops_of(TrainJob(stage, job.config, None, tmp_path, "hash"))
        samples = settings.max_steps * settings.batch_size
        assert samples * flops.per_sample == found[stage]
        assert flops.peak_per_s == 3e9
