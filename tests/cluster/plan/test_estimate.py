"""The estimate equals what torch counts, what the objectives call, and what lies on disk."""

import shutil

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.plan.estimate import estimate, teacher_forwards
from cluster.plan.stream import stream_plan
from cluster.settings.hydra import compose
from distill.config import ImageSpec, TrainConfig
from distill.data.shards import write_shard
from distill.data.sidecar import shard_spec, sidecar_path
from distill.engine.engine import TorchEngine
from distill.evaluation.evaluate import evaluate
from distill.flow.trajectory import GeneratedShard, TrajectoryBatch
from distill.networks.build import build_network
from distill.networks.config import DiTConfig, UNetConfig
from distill.networks.cost import network_cost
from distill.networks.dit import DiT
from distill.objectives.build import build_objective
from distill.objectives.config import (
    BezierConfig,
    ConsistencyConfig,
    EndpointConfig,
    MeanFlowConfig,
    ReflowConfig,
    TraFlowConfig,
)
from distill.run.dir import RunDir
from distill.teachers.config import TeacherConfig


@pytest.mark.parametrize(
    ("config", "image"),
    [
        (DiTConfig(patch_size=2, width=64, depth=4, num_heads=4), ImageSpec(1, 8, 10)),
        (
            DiTConfig(patch_size=4, width=32, depth=2, num_heads=2, mlp_ratio=2.5),
            ImageSpec(3, 16, 0),
        ),
        (UNetConfig(width=32), ImageSpec(3, 32, 10)),
        (
            UNetConfig(
                width=16, channel_mults=[1, 2, 3, 4], blocks_per_level=1, attention_sizes=[8, 4]
            ),
            ImageSpec(1, 32, 0),
        ),
    ],
)
def test_parameters_and_flops_equal_those_that_torch_counts(config, image):
    network, cost = build_network(config, image), network_cost(config, image)
    assert cost.parameters == sum(parameter.numel() for parameter in network.parameters())
    x, t = torch.zeros(2, *image.shape), torch.zeros(2)
    with FlopCounterMode(display=False) as counter:
        network(x, t, t, torch.zeros(2, dtype=torch.int64))
    assert 2 * cost.flops == counter.get_total_flops()


@pytest.mark.parametrize(
    "config",
    [
        TraFlowConfig(sampler_nfe=[2, 4]),
        TraFlowConfig(weight_consistency=1.0, weight_flow_matching=1.0, sampler_nfe=[2, 4]),
        TraFlowConfig(weight_states=0.0, sampler_nfe=[2, 4]),
        TraFlowConfig(velocity_mode="straight", sampler_nfe=[2, 4]),
        BezierConfig(),
        BezierConfig(weight_map=0.0, weight_drift=1.0),
        EndpointConfig(),
        ReflowConfig(),
        ConsistencyConfig(),
        MeanFlowConfig(),
    ],
)
def test_objective_calls_are_those_that_the_objective_makes(config):
    calls = {"student": 0, "target": 0}

    def network(name):
        def u(x, t, s, label):
            calls[name] += len(x) // 4  # calls of a batch of 4, made as one
            return x * 0.5

        return u

    batch = TrajectoryBatch(
        states=torch.randn(4, 2, 5, 1, 2, 2),
        times=torch.linspace(0, 1, 5),
        weights=torch.tensor([0.5, 0.5]),
        labels=torch.zeros(4, dtype=torch.int64),
        ids=torch.arange(4),
        positions=torch.arange(4),
        global_size=4,
    )
    build_objective(config, seed=0).loss(batch, network("student"), network("target"), 0)
    assert config.calls().forwards == sum(calls.values())


@pytest.mark.parametrize(
    "config",
    [
        TraFlowConfig(weight_consistency=1.0, weight_flow_matching=1.0),
        TraFlowConfig(weight_consistency=1.0, weight_flow_matching=1.0, weights="adaptive"),
        BezierConfig(),
        EndpointConfig(),
        ConsistencyConfig(),
        MeanFlowConfig(),
    ],
)
def test_work_in_forwards_is_what_torch_counts_in_a_step(config):
    # Forward mode and double backward are left out: torch's counter does not see them rightly.
    image = ImageSpec(1, 8, 10)
    network = build_network(DiTConfig(patch_size=2, width=64, depth=4, num_heads=4), image)
    engine = TorchEngine(network, TrainConfig(), torch.device("cpu"))
    batch = TrajectoryBatch(
        states=torch.randn(4, 2, 9, *image.shape),
        times=torch.linspace(0, 1, 9),
        weights=torch.tensor([0.5, 0.5]),
        labels=torch.arange(4),
        ids=torch.arange(4),
        positions=torch.arange(4),
        global_size=4,
    )
    objective = build_objective(config, seed=0, gradient_norms=engine.gradient_norms)
    with FlopCounterMode(display=False) as forward:
        engine.target(batch.noise, torch.zeros(4), torch.ones(4), batch.labels)
    with FlopCounterMode(display=False) as step:
        loss = objective.loss(batch, engine.student, engine.target, 0).total
        engine.backward(loss, last=True)
    ratio = step.get_total_flops() / forward.get_total_flops()
    # the first layer has no gradient to its input
    assert ratio == pytest.approx(config.calls().in_forwards, rel=0.02)


def test_a_trajectory_costs_steps_times_stages_times_two_for_guidance():
    assert teacher_forwards(TeacherConfig(solver="heun", steps=16, guidance=1.5)) == 64
    assert teacher_forwards(TeacherConfig(solver="euler", steps=8, guidance=1.0)) == 8


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
    plan, sidecar = stream_plan(config), sidecar_path(run, 0).stat().st_size
    assert plan.shard_bytes == written.num_bytes
    assert plan.sample_bytes == pytest.approx((written.num_bytes + sidecar) / num, rel=0.01)


def test_cost_is_hours_times_price():
    (config,) = compose(["experiment=fashion", "cluster.device_cost_per_hour=3"])
    found = estimate(config, speed=1e12)
    hours = sum(found["formula"]["flops"].values()) / 1e12 / 3600
    assert found["assumed"]["total_device_hours"] == pytest.approx(hours)
    assert found["assumed"]["cost"] == pytest.approx(3 * hours)
    assert estimate(config, speed=2e12)["assumed"]["total_device_hours"] == pytest.approx(hours / 2)
