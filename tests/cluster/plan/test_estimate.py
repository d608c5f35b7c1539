"""The estimate is what a run makes, calls and writes."""

import shutil

import numpy as np
import pytest
import torch

from cluster.plan.estimate import estimate, teacher_forwards
from cluster.plan.stream import stream_plan
from cluster.settings.hydra import compose
from distill.data.shards import write_shard
from distill.data.sidecar import shard_spec
from distill.evaluation.evaluate import evaluate
from distill.export.student import latest_student
from distill.flow.trajectory import GeneratedShard
from distill.networks.dit import DiT
from distill.objectives.config import OBJECTIVES
from distill.run.files import RunDir
from distill.teachers.config import NativeConfig


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_can_be_asked_for_and_is_estimated(name):
    """By its file in configs/objective; that the calls are true, tests/distill/objectives says."""
    (config,) = compose(["experiment=tiny", f"objective={name}"])
    assert type(config.objective) is OBJECTIVES[name]
    found, calls = estimate(config), config.objective.calls()
    seen = config.train.max_steps * config.train.batch_size
    assert found["exact"]["forwards"]["train"] == round(seen * calls.forwards) > 0
    forward = found["formula"]["flops_per_forward"]
    assert found["formula"]["flops"]["train"] == seen * calls.in_forwards * forward


def test_a_trajectory_costs_steps_times_stages_times_two_for_guidance():
    assert teacher_forwards(NativeConfig(solver="heun", steps=16, guidance=1.5)) == 64
    assert teacher_forwards(NativeConfig(solver="euler", steps=8, guidance=1.0)) == 8


@pytest.mark.parametrize(
    ("solver", "guidance"), [("heun", 1.5), ("heun", 1.0), ("euler", 1.5), ("rk4", 1.0)]
)
def test_evaluation_forwards_are_those_of_a_real_evaluation(
    solver, guidance, finished_run, tmp_path
):
    # Heun has no 1 NFE, RK4 no 2; at 8 NFE Heun is the fine solution; 3 columns of pictures.
    run = RunDir(shutil.copytree(finished_run.root, tmp_path / "run"))
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={run.root}",
            f"teacher.pretrained.solver={solver}",
            f"teacher.pretrained.guidance={guidance}",
            f"teacher.pretrained.path={run.teacher.model(3)}",
            "eval.num_samples=3",
            "eval.batch_size=2",
            "eval.nfe=[1,2]",
            "eval.teacher_nfe=[1,2,8]",
            "eval.euler_nfe=[1,3]",
            "eval.reference_steps=4",
        ]
    )
    latest_student(run)  # an export compares the model with the trained one
    images = []

    def count(module, inputs):
        if isinstance(module, DiT):
            images.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        evaluate(run, config.data, config.teacher, config.eval, "traflow", "cpu")
    finally:
        hook.remove()
    assert estimate(config)["exact"]["forwards"]["evaluate"] == sum(images)


def test_blocks_cover_the_reads_and_no_more():
    # 6 steps of 16 read 96 samples; a block of 2 shards of 16, twice, gives 64.
    (config,) = compose(["experiment=tiny"])
    plan = stream_plan(config)
    assert (plan.blocks, plan.shards, plan.samples) == (2, 4, 64)
    config.train.max_steps = 8  # 128 = 2 blocks exactly
    assert stream_plan(config).blocks == 2
    config.train.max_steps = 9
    assert stream_plan(config).blocks == 3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trajectory.store_noise=false", "trajectory.dtype=float32"],
        ["teacher=early_late", "trajectory.samples_per_shard=40", "trajectory.grid=16"],
        ["trajectory.dtype=bfloat16", "trajectory.store_points=[0,4,8]", "objective=endpoint"],
        ["trajectory.samples_per_shard=5", "trajectory.store_noise=false"],
        ["data.size=32", "data.channels=3", "trajectory.store_points=[0,8]", "objective=endpoint"],
    ],
)
def test_shard_bytes_are_those_of_a_real_shard(overrides, tmp_path):
    (config,) = compose(["experiment=tiny", *overrides])
    trajectory, image = config.trajectory, config.data.image
    fingerprints = {name: "0" * 64 for name in config.teacher}
    spec = shard_spec(config.seed, image, trajectory, config.teacher, fingerprints)
    num, points = trajectory.samples_per_shard, len(trajectory.points)
    generated = GeneratedShard(
        states=torch.zeros(num, len(config.teacher), points, *image.shape),
        labels=np.full(num, 7, dtype=np.int64),
        ids=np.arange(num, dtype=np.int64),
        nfe=0,
        forwards=0,
        batch_size=num,
    )
    run = RunDir(tmp_path)
    written = write_shard(run, spec, 0, generated, seconds=0.0, producer="test")
    plan, sidecar = stream_plan(config), run.sidecar(0).stat().st_size
    assert plan.shard_bytes == written.num_bytes
    assert plan.sample_bytes == pytest.approx((written.num_bytes + sidecar) / num, rel=0.01)


def test_cost_is_hours_times_price():
    (config,) = compose(["experiment=fashion", "cluster.device_cost_per_hour=3"])
    found = estimate(config, speed=1e12)
    hours = sum(found["formula"]["flops"].values()) / 1e12 / 3600
    assert found["assumed"]["total_device_hours"] == pytest.approx(hours)
    assert found["assumed"]["cost"] == pytest.approx(3 * hours)
    assert estimate(config, speed=2e12)["assumed"]["total_device_hours"] == pytest.approx(hours / 2)
