"""Drawing the sample set of an evaluation with a sampler, on all cores."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ImageSpec
from distill.evaluation.config import EvalConfig
from distill.flow import paths, solvers
from distill.flow.noise import sample_labels, sample_noise
from distill.flow.times import NFE_PER_STEP
from distill.sample import few_step

# (noise [B, C, H, W], label [B]) -> image [B, C, H, W]
Sampler = Callable[[Tensor, Tensor], Tensor]
# v(x, t [B], label) -> velocity
TeacherVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """The fixed sample set of an evaluation, on the CPU."""

    noise: Float[Tensor, "N *S"]
    labels: Int[Tensor, "N"]


def evaluation_samples(
    evaluation: EvalConfig, image: ImageSpec, counts: Int[np.ndarray, "K"] | None = None
) -> Samples:
    """Noise and labels of the ids 0 .. num_samples - 1 of eval.seed.

    Classes come as often as `counts` says, each as often where it is not given.
    """
    ids = np.arange(evaluation.num_samples)
    noise = sample_noise(evaluation.seed, ids, image.shape)
    labels = sample_labels(evaluation.seed, ids, image.num_classes, counts)
    return Samples(torch.from_numpy(noise), torch.from_numpy(labels))


def student_sampler(u: paths.MeanVelocity, nfe: int, middle: float) -> Sampler:
    """Samples of a student at `nfe` jumps; with two of them the second begins at `middle`."""
    return lambda noise, labels: few_step(u, noise, labels, nfe, middle)


def teacher_sampler(velocity: TeacherVelocity, solver: str, nfe: int) -> Sampler:
    """End points of the teacher's ODE at `nfe` evaluations of its velocity, on the uniform grid."""
    steps, rest = divmod(nfe, NFE_PER_STEP[solver])
    assert steps > 0 and rest == 0

    @torch.no_grad()
    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        times = torch.tensor([0.0, 1.0], device=noise.device)
        return solvers.solve(
            lambda x, t: velocity(x, t.expand(len(x)), labels), noise, times, solver, steps
        )[-1]

    return sample


class GivenUp(Exception):
    """The drawing was interrupted; nobody waits for this result."""


class Interrupt:
    """Ends the threads of a drawing when the thread that waits for them is interrupted.

    A context in the waiting thread. Networks that went through `watch` raise GivenUp from their
    next call on once the context was left by an exception.
    """

    def __init__(self) -> None:
        self._is_given_up = False

    def watch(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`network`, which no longer runs once the drawing was given up."""

        def watched(*args: Tensor) -> Tensor:
            if self._is_given_up:
                raise GivenUp
            return network(*args)

        return watched

    def __enter__(self) -> "Interrupt":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_given_up = kind is not None


def draw(
    sampler: Sampler,
    samples: Samples,
    batch_size: int,
    device: torch.device,
    interrupt: Interrupt,
    advance: Callable[[int], None] = lambda num: None,
) -> tuple[Float[Tensor, "N *S"], float]:
    """Images for all samples, float32 on the CPU, and seconds. `advance` hears of each batch.

    On a CPU each core takes whole batches: threads inside every small operation would mostly wait
    for each other. The batches, and so the numbers, do not depend on the number of cores.
    """
    noise, labels = samples.noise.split(batch_size), samples.labels.split(batch_size)

    def run(noise: Tensor, labels: Tensor) -> Tensor:
        return sampler(noise.to(device), labels.to(device)).float().cpu()

    started, parts = time.perf_counter(), []
    num_jobs = len(noise) if device.type == "cpu" else 1
    with cores(num_jobs) as workers, ThreadPoolExecutor(workers) as pool, interrupt:
        for part in pool.map(run, noise, labels):
            parts.append(part)
            advance(len(part))
    return torch.cat(parts), time.perf_counter() - started


@contextmanager
def cores(num_jobs: int) -> Iterator[int]:
    """Threads to run jobs in, one per core; meanwhile torch takes one core per operation."""
    before = torch.get_num_threads()
    workers = min(len(os.sched_getaffinity(0)), num_jobs)
    torch.set_num_threads(1 if workers > 1 else before)
    try:
        yield workers
    finally:
        torch.set_num_threads(before)
