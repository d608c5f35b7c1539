"""One rank of a training, as a recipe: network, engine, source, objective, callbacks, train.

The same code trains a teacher on real images ("pretrain") and the student on trajectories
("train").
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from cluster.trainer import sources, watchdog, zero
from cluster.trainer.job import TrainJob
from distill.checkpoint.commit import load_latest
from distill.engine.engine import Engine
from distill.networks import build, cost, layers
from distill.networks.files import unlike, with_weights_of
from distill.objectives.build import build_objective
from distill.objectives.config import ObjectiveConfig, ReflowConfig
from distill.run import events, files
from distill.teachers.build import start_of
from distill.training import callbacks, log, loop, memory, saving
from distill.training.build import build_callbacks

# Ranks of a killed supervisor are gone within seconds; a file server gives the lock of a dead node
# free after its lease, usually 90 s.
LOCK_TIMEOUT_S = 120.0


def run_rank(job: TrainJob, device: torch.device, should_stop: Callable[[], bool]) -> int:
    """Steps done: `max_steps`, or fewer when asked to stop. The process group must be up."""
    if device.type == "cpu":  # on a GPU the host's memory is for others between two saves
        memory.keep_freed_memory()
    hang = job.run.hangs / f"rank_{dist.get_rank():05d}.txt"
    with watchdog.ending_when_hung(hang, job.config.cluster.trainer.step_timeout_s) as beat:
        network, weights = initial_network(job)
        engine = zero.DeepSpeedEngine(network, job.train, device)
        with _only_trainer(job.run, engine):
            if engine.rank == 0:
                events.append(job.run, events.Init(weights))
            source = sources.build_source(job, engine, should_stop, beat)
            return resume(job, engine, source, should_stop)


def resume(
    job: TrainJob, engine: Engine, source: loop.Source, should_stop: Callable[[], bool]
) -> int:
    """Steps done: goes on from the newest checkpoint that verifies."""
    objective = build_objective(
        objective_of(job),
        job.config.seed,
        engine.device,
        engine.gradient_norms,
        job.train.max_steps,
    )
    hooks = build_job_callbacks(job, engine, source)
    start = load_latest(job.run.checkpoints, engine, origin_of(job))
    return loop.train(
        engine, source, objective, job.train, hooks, start=start, should_stop=should_stop
    )


def objective_of(job: TrainJob) -> ObjectiveConfig:
    """What is optimised: a teacher learns the straight paths from noise to data."""
    return job.config.objective if job.stage == "train" else ReflowConfig()


def build_job_callbacks(
    job: TrainJob, engine: Engine, source: loop.Source
) -> list[callbacks.Callback]:
    """What hangs on the loop; in a teacher's training its exports too."""
    config, image = job.config, job.config.data.image
    hooks = build_callbacks(engine, source, job.train, job.run, origin_of(job), flops_of(job))
    if job.exports:
        about = {"data": config.data.name, "seed": config.seed}
        wait = callbacks.Everyone(hooks).wait
        hooks.append(
            saving.Exporter(engine, job.run, job.exports, config.student, image, about, wait)
        )
    return hooks


def origin_of(job: TrainJob) -> dict[str, Any]:
    """What the checkpoints of the run say of it."""
    return {"seed": job.config.seed, "config_hash": job.config_hash}


def flops_of(job: TrainJob) -> log.Flops:
    """FLOP of a sample by formula, recomputed blocks left out, and the peak to compare with."""
    forward = cost.network_cost(job.config.student, job.config.data.image).flops
    per_sample = objective_of(job).calls().in_forwards * forward
    return log.Flops(float(per_sample), job.config.cluster.device_peak_flops)


def initial_network(job: TrainJob) -> tuple[layers.AbstractNetwork, str]:
    """The network before the first step, and in words where its weights come from.

    A student starts as its last teacher when that is a network of the same architecture: the branch
    of the jump s - t is still zero, so it begins with exactly the teacher's velocity, without
    guidance.
    """
    student, image, seed = job.config.student, job.config.data.image, job.config.seed
    if job.stage == "pretrain":
        return build.build_network(student, image, seed), "fresh"
    name, teacher = list(job.config.teacher.items())[-1]
    start = start_of(teacher)
    if start is None:
        why = f"is of kind {teacher.kind}"
    elif (network := with_weights_of(start, student, image)) is None:
        other = ", ".join(unlike(start.config, student))
        why = (
            f"has not the student's {other}"
            if other
            else "has another architecture than the student"
        )
    else:
        return network, f"teacher.{name}"
    return build.build_network(student, image, seed), f"fresh: teacher.{name} {why}"


@contextmanager
def _only_trainer(run: files.RunDir, engine: Engine) -> Iterator[None]:
    """Holds the lock that keeps ranks of a killed supervisor from writing next to ours.

    Raises:
        RuntimeError: they still held it after LOCK_TIMEOUT_S. Another start may find it free.
    """
    if engine.rank != 0:
        engine.any(False)  # waits for rank 0 to have it
        yield
        return
    run.root.mkdir(parents=True, exist_ok=True)
    with run.trainer_lock.open("w") as file:
        try:
            files.lock_file(file.fileno(), LOCK_TIMEOUT_S)
        except BlockingIOError as error:
            raise RuntimeError(
                f"ranks of an earlier start have held {run.trainer_lock} for {LOCK_TIMEOUT_S:g} s; "
                "end their processes (`train_rank`) on the nodes that they ran on"
            ) from error
        engine.any(False)
        yield
