"""Helpers for tests: analytic flows, small networks, processes, faults, tiny shards."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed as dist, multiprocessing as mp

from distill.config import ImageSpec
from distill.data import shards, sidecar
from distill.flow.noise import sample_labels, sample_noise
from distill.flow.paths import expand_as
from distill.flow.trajectory import GeneratedShard, TrajectoryBatch
from distill.networks import build, config, layers
from distill.run import files, identity as run_json
from distill.teachers.analytic import MixtureTeacher

# -----------------------------------------------------------------------------------------------
# Analytic flows


class GaussianFlow:
    """The flow from noise N(0, I) to data N(m, c^2 I) in closed form.

    With v_t = (1-t)^2 + t^2 c^2:

        x_s = s m + sqrt(v_s / v_t) (x_t - t m)
        v(x, t) = m + (t c^2 - (1-t)) / v_t (x - t m)
    """

    def __init__(self, mean: Float[Tensor, "*S"], std: float) -> None:
        self.mean, self.std = mean, std

    def _variance(self, t: Tensor) -> Tensor:
        return (1 - t) ** 2 + t**2 * self.std**2

    def _times(self, t: Tensor | float, x: Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype)
        return expand_as(t, x) if t.ndim else t

    def map(
        self, x: Float[Tensor, "B *S"], t: Tensor | float, s: Tensor | float
    ) -> Float[Tensor, "B *S"]:
        """x_s for x_t = x; t and s are numbers or [B]."""
        t, s = self._times(t, x), self._times(s, x)
        scale = (self._variance(s) / self._variance(t)).sqrt()
        return s * self.mean + scale * (x - t * self.mean)

    def velocity(self, x: Float[Tensor, "B *S"], t: Tensor | float) -> Float[Tensor, "B *S"]:
        """dx/dt at x_t = x; t is a number or [B]."""
        t = self._times(t, x)
        slope = (t * self.std**2 - (1 - t)) / self._variance(t)
        return self.mean + slope * (x - t * self.mean)

    def student(
        self,
        x: Float[Tensor, "B *S"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B *S"]:
        """u(x, t, s): the perfect student. (map - x) / (s - t), and the velocity where s = t.

        sqrt(v_s) - sqrt(v_t) is written as (v_s - v_t) / (sqrt(v_s) + sqrt(v_t)), so it is smooth
        at s = t and can be differentiated there.
        """
        t, s = expand_as(t, x), expand_as(s, x)
        v_t, v_s = self._variance(t), self._variance(s)
        # (v_s - v_t) / (s - t) for v = (1-t)^2 + t^2 c^2
        change = (s + t) * (1 + self.std**2) - 2
        slope = change / (v_s.sqrt() + v_t.sqrt()) / v_t.sqrt()
        return self.mean + slope * (x - t * self.mean)


class StraightFlow:
    """Straight lines from noise N(0, I) to data N(m, c^2 I): the Gaussian's own second reflow.

        x_t = (1-t) x_0 + t x_1,   x_1 = m + c x_0

    u(x, t, s) = x_1 - x_0 with x_0 = (x - t m) / (1 + t (c-1)); it does not change with s.
    """

    def __init__(self, mean: Float[Tensor, "*S"], std: float) -> None:
        self.mean, self.std = mean, std

    def _velocity(self, x: Float[Tensor, "B *S"], t: Tensor | float) -> Float[Tensor, "B *S"]:
        return self.mean + (self.std - 1) * (x - t * self.mean) / (1 + t * (self.std - 1))

    def map(self, x: Float[Tensor, "B *S"], t: float, s: float) -> Float[Tensor, "B *S"]:
        """x_s for x_t = x."""
        return x + (s - t) * self._velocity(x, t)

    def student(
        self,
        x: Float[Tensor, "B *S"],
        t: Float[Tensor, "B"],
        s: Float[Tensor, "B"],
        label: Int[Tensor, "B"],
    ) -> Float[Tensor, "B *S"]:
        """u(x, t, s): the perfect student. s takes part, so that du/ds = 0 is defined."""
        return self._velocity(x, expand_as(t, x)) + 0 * expand_as(s, x)


def tiny_teacher(size: int = 4, conditional: bool = True) -> MixtureTeacher:
    """Three Gaussians on images [1, size, size]: a bright, a dark and a grey one."""
    levels = torch.tensor([-0.8, 0.0, 0.8], dtype=torch.float64)
    means = levels[:, None, None, None].expand(3, 1, size, size)
    stds = torch.tensor([0.1, 0.2, 0.1], dtype=torch.float64)
    return MixtureTeacher(means, stds, torch.ones(3, dtype=torch.float64), conditional)


# -----------------------------------------------------------------------------------------------
# Students and what they learn from

NETWORKS: dict[str, config.NetworkConfig] = {
    "dit": config.DiTConfig(patch_size=2, width=16, depth=1, num_heads=2),
    "unet": config.UNetConfig(
        width=8, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[2], num_heads=2
    ),
    "lightningdit": config.LightningDiTConfig(
        patch_size=2, width=16, depth=1, num_heads=2, mlp_ratio=2.0
    ),
    "edm_unet": config.EdmUNetConfig(
        width=16, condition_mult=2, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[2]
    ),
    "edm2_unet": config.Edm2UNetConfig(
        width=16, channel_mults=[1, 4], blocks_per_level=1, attention_sizes=[2]
    ),
}


def random_network(name: str, image: ImageSpec, seed: int = 0) -> layers.AbstractNetwork:
    """A small network of NETWORKS in float64, no weight of it zero."""
    network = build.build_network(NETWORKS[name], image)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            factor = 0.5 if key.endswith("_gain") else 0.2
            parameter.copy_(factor * torch.randn(parameter.shape, generator=generator))
    return network.double()


def batch_of(
    states: Float[Tensor, "B M K1 *S"], weights: list[float] | None = None
) -> TrajectoryBatch:
    """A whole global batch at t = 0, 1/K .. 1, with labels 0, 1, 2, 0 .. and equal weights."""
    count, teachers, points = states.shape[:3]
    return TrajectoryBatch(
        states=states,
        times=torch.linspace(0, 1, points, dtype=states.dtype),
        weights=torch.tensor([weights or [1 / teachers] * teachers] * count, dtype=states.dtype),
        condition=torch.arange(count) % 3,
        ids=torch.arange(count),
        positions=torch.arange(count),
        global_size=count,
    )


def flow_batch(
    *flows: GaussianFlow | StraightFlow,
    grid: int = 8,
    count: int = 16,
    weights: list[float] | None = None,
) -> TrajectoryBatch:
    """Exact trajectories of closed-form teachers from the same noise, float64."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(count, *flows[0].mean.shape, dtype=torch.float64, generator=generator)
    paths = [
        torch.stack([flow.map(x_0, 0.0, k / grid) for k in range(grid + 1)], dim=1)
        for flow in flows
    ]
    return batch_of(torch.stack(paths, dim=1), weights)


# -----------------------------------------------------------------------------------------------
# Several processes


def _rank_main(
    rank: int, world_size: int, folder: str, source: tuple[str, str], args: tuple[Any, ...]
) -> None:
    """Runs function `source[1]` of the file `source[0]` as one rank."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    # The traceback of a failing rank goes here, for the parent to show.
    sys.stderr = (Path(folder) / f"stderr_{rank}.txt").open("w", buffering=1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    # By file, not by import: pytest's names of test modules mean nothing in another process.
    spec = spec_from_file_location("ranks", source[0])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    worker = vars(module)[source[1]]
    torch.save(worker(rank, world_size, *args), Path(folder) / f"result_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(worker: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[Any]:
    """Results of worker(rank, world_size, *args) in `world_size` processes joined by gloo, by rank.

    `worker` is a module-level function; its result is tensors or plain values. Ranks meet through a
    file in `folder` (fresh per call), and are forked from a server that has nothing of this one.

    Raises:
        AssertionError: a rank failed; carries its traceback.
    """
    folder.mkdir(parents=True)
    source = (inspect.getfile(worker), worker.__name__)
    context = mp.get_context("forkserver")
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, str(folder), source, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.1)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        said = [path.read_text() for path in sorted(folder.glob("stderr_*.txt"))]
        raise AssertionError("\n".join([f"exit codes {codes}", *said]))
    paths = [folder / f"result_{rank}.pt" for rank in range(world_size)]
    return [torch.load(path, weights_only=True) for path in paths]


# -----------------------------------------------------------------------------------------------
# Faults


class FaultInjector:
    """Makes call number `at` (from 0) of a function fail once, and counts.

    A test asserts both that the code recovered and that `count` is 1: that the fault did strike.
    """

    def __init__(self, function: Callable[..., Any], at: int, error: BaseException) -> None:
        self.function, self.at, self.error = function, at, error
        self.calls = self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, or the fault."""
        index, self.calls = self.calls, self.calls + 1
        if index == self.at:
            self.count += 1
            raise self.error
        return self.function(*args, **kwargs)


# -----------------------------------------------------------------------------------------------
# Shards


def tiny_spec(
    samples_per_shard: int = 4,
    grid: int = 2,
    teachers: int = 2,
    dtype: str = "float16",
    store_noise: bool = True,
    seed: int = 3,
    store_velocity: bool = False,
) -> sidecar.ShardSpec:
    """What shards of images [1, 2, 2] share; teacher k is called "teacher<k>"."""
    return sidecar.ShardSpec(
        seed=seed,
        times=tuple(k / grid for k in range(grid + 1)),
        dtype=dtype,
        store_noise=store_noise,
        image=(1, 2, 2),
        samples_per_shard=samples_per_shard,
        store_velocity=store_velocity,
        teachers=tuple(
            sidecar.TeacherSpec(f"teacher{k}", 64 * str(k), "euler", grid, 1.0)
            for k in range(teachers)
        ),
    )


def tiny_shard(spec: sidecar.ShardSpec, shard: int) -> GeneratedShard:
    """Straight lines from the noise of each id to the constant image (label + teacher) / 10."""
    ids = np.array(spec.ids(shard), dtype=np.int64)
    labels = sample_labels(spec.seed, ids, 10)
    noise = torch.from_numpy(sample_noise(spec.seed, ids, spec.image))
    times = torch.tensor(spec.times)[:, None, None, None]
    teacher = torch.arange(len(spec.teachers))
    ends = ((torch.from_numpy(labels)[:, None] + teacher) / 10)[:, :, None, None, None, None]
    states = (1 - times) * noise[:, None, None] + times * ends
    velocities = (ends - noise[:, None, None]).expand_as(states) if spec.store_velocity else None
    return GeneratedShard(states, labels, ids, len(ids), 2 * len(ids), len(ids), velocities)


def write_tiny_shards(run: files.RunDir, spec: sidecar.ShardSpec, numbers: Iterable[int]) -> None:
    """Commits `tiny_shard`s to a run."""
    for shard in numbers:
        shards.write_shard(run, spec, shard, tiny_shard(spec, shard), 1.5, "test")


TINY_STREAM = run_json.StreamRecord(
    seed=0, samples_per_shard=16, block_shards=2, passes=2, batch_size=16
)


def write_tiny_record(
    run: files.RunDir,
    identity: dict[str, Any],
    stream: run_json.StreamRecord = TINY_STREAM,
    **teachers: str,
) -> run_json.RunRecord:
    """run.json of a run with the given settings, and with fingerprints of its teachers by name."""
    versions = {"torch": "2"}
    parts = (
        run_json.FORMAT,
        run_json.hash_of(identity),
        stream.seed,
        identity,
        stream,
        (),
        teachers,
        versions,
    )
    record = run_json.RunRecord(*parts)
    run_json.write_record(run, record)
    return record
