"""One rank of a training: engine, stream and objective, put together around
`distill.training.loop`.

The same code trains a teacher on real images ("pretrain") and the student on trajectories
("train").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from cluster.plan.stream import stream_order
from cluster.state.cursor import WithCursor
from cluster.trainer.job import TrainJob
from cluster.trainer.watchdog import ending_when_hung
from cluster.trainer.zero import DeepSpeedEngine
from distill.checkpoint.agree import agreed_latest
from distill.checkpoint.manifest import step_name
from distill.config import ConfigError
from distill.data.images import ImageStream, load_images
from distill.data.stream import TrajectoryStream
from distill.engine.engine import Engine
from distill.export.student import export_checkpoint
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.build import build_network
from distill.networks.cost import network_cost
from distill.networks.files import DESCRIPTION, load_model
from distill.networks.layers import AbstractNetwork
from distill.objectives.base import Objective
from distill.objectives.build import build_objective
from distill.objectives.config import ObjectiveConfig, ReflowConfig
from distill.run.dir import RunDir
from distill.run.files import append_line, lock_file
from distill.teachers.sit import load_sit
from distill.training.log import Work
from distill.training.loop import train
from distill.training.memory import keep_freed_memory

# Ranks of a killed supervisor are gone within seconds; a file server gives the lock of a dead node
# free after its lease, usually 90 s.
LOCK_TIMEOUT_S = 120.0


def run_rank(job: TrainJob, device: torch.device, should_stop: Callable[[], bool]) -> int:
    """Steps done: `max_steps`, or fewer when asked to stop. The process group must be up."""
    if device.type == "cpu":  # on a GPU the host's memory is for others between two saves
        keep_freed_memory()
    hang = job.run.hangs / f"rank_{dist.get_rank():05d}.txt"
    with ending_when_hung(hang, job.config.cluster.trainer.step_timeout_s) as beat:
        network, origin = initial_network(job)
        engine = DeepSpeedEngine(network, job.train, device)
        with _only_trainer(job.run, engine):
            if engine.rank == 0:
                append_line(job.run.events, {"kind": "init", "weights": origin})
            config = objective_of(job)
            objective = build_objective(config, job.config.seed, device, engine.gradient_norms)

            def should_stop_waiting() -> bool:
                beat()  # to wait for data is no hang, and the stream has a limit of its own
                return should_stop()

            source = Watched(open_source(job, engine, should_stop_waiting), beat)
            return train_with_exports(job, engine, source, objective, should_stop)


def objective_of(job: TrainJob) -> ObjectiveConfig:
    """What is optimised: a teacher learns the straight paths from noise to data."""
    return job.config.objective if job.stage == "train" else ReflowConfig()


def work_of(job: TrainJob) -> Work:
    """FLOP of a sample by formula, recomputed blocks left out, and the peak to compare with."""
    forward = network_cost(job.config.student, job.config.data.image).flops
    per_sample = objective_of(job).calls().in_forwards * forward
    return Work(float(per_sample), job.config.cluster.device_peak_flops)


# -----------------------------------------------------------------------------------------------
# Weights


def initial_network(job: TrainJob) -> tuple[AbstractNetwork, str]:
    """The network before the first step, and in words where its weights come from.

    A student starts as its last teacher when that is native or a SiT and has the same architecture:
    the branch of the jump s - t is still zero, so it begins with exactly the teacher's velocity,
    without guidance.
    """
    config = job.config
    network = build_network(config.student, config.data.image, config.seed)
    if job.stage == "pretrain":
        return network, "fresh"
    name, teacher = list(config.teacher.items())[-1]
    match teacher.kind:
        case "native":
            state = load_model(Path(teacher.path), "cpu")[0].state_dict()
        case "sit":
            state = load_sit(Path(teacher.path), teacher.num_heads, "cpu").network.state_dict()
        case _:
            return network, f"fresh: teacher.{name} is of kind {teacher.kind}"
    own = network.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        return network, f"fresh: teacher.{name} has another architecture than the student"
    network.load_state_dict(state)
    return network, f"teacher.{name}"


def export_model(job: TrainJob, step: int, done: int) -> None:
    """Writes the model after `step` steps from the checkpoint of that step, unless it is there.

    Raises:
        ConfigError: training is beyond that step.
    """
    folder = job.run.model(step)
    if (folder / DESCRIPTION).is_file():
        return
    if done != step:
        raise ConfigError(
            f"{folder} is missing, and the checkpoint of step {step} it was made from is no longer "
            f"kept; put it back, or move {job.run.root} away to train the teacher again"
        )
    meta = {"kind": "teacher", "step": step, "data": job.config.data.name, "seed": job.config.seed}
    checkpoint = job.run.checkpoints / step_name(step)
    export_checkpoint(checkpoint, folder, job.config.student, job.config.data.image, meta)


# -----------------------------------------------------------------------------------------------
# Data


class Source(Protocol):
    """Where a rank's batches come from."""

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data so far."""

    def read(self, step: int) -> TrajectoryBatch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""


class Images:
    """Real images as a source; they never make a trainer wait."""

    wait_s = 0.0

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream

    def read(self, step: int) -> TrajectoryBatch:
        """This rank's part of global batch `step`."""
        return self._stream.read(step)


class Watched:
    """A source that says at every step that its rank goes on."""

    def __init__(self, source: Source, beat: Callable[[], None]) -> None:
        self._source, self._beat = source, beat

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._source.wait_s

    def read(self, step: int) -> TrajectoryBatch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""
        batch = self._source.read(step)
        self._beat()
        return batch


class Position:
    """A source that remembers the step last read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.step = -1

    def read(self, step: int) -> TrajectoryBatch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited."""
        self.step = step
        return self._source.read(step)


def open_source(job: TrainJob, engine: Engine, should_stop: Callable[[], bool]) -> Source:
    """The stream of this stage for this rank."""
    config, rank, world_size = job.config, engine.rank, engine.world_size
    if job.stage == "pretrain":
        images, labels = load_images(config.data)
        batch_size, dropout = job.train.batch_size, job.train.label_dropout
        return Images(
            ImageStream(images, labels, config.seed, batch_size, rank, world_size, dropout)
        )
    assert job.spec is not None
    order = stream_order(config)
    weights = [teacher.weight for teacher in config.teacher.values()]
    stream = TrajectoryStream(
        job.run, job.spec, config.trajectory, order, rank, world_size, weights, should_stop
    )
    return WithCursor(stream, order, job.run, rank)


# -----------------------------------------------------------------------------------------------
# Training


def train_with_exports(
    job: TrainJob,
    engine: Engine,
    source: Source,
    objective: Objective,
    should_stop: Callable[[], bool],
) -> int:
    """Steps done. Stops at every export, which saves, exports, and goes on."""
    position = Position(source)
    done = agreed_latest(job.run.checkpoints, engine)
    start: int | None = done
    for end in sorted({*job.exports, job.train.max_steps}):

        def is_enough(end: int = end) -> bool:
            return should_stop() or position.step + 1 >= end

        if done < end:
            done = train(
                engine,
                position.read,
                objective,
                job.train,
                job.run,
                origin={"seed": job.config.seed, "config_hash": job.config_hash},
                wait_s=lambda: source.wait_s,
                should_stop=is_enough,
                work=work_of(job),
                start=start,
            )
            start = None  # what was saved since is verified before it is loaded
        if done < end:
            return done
        if end in job.exports and engine.rank == 0:
            export_model(job, end, done)
    return done


@contextmanager
def _only_trainer(run: RunDir, engine: Engine) -> Iterator[None]:
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
            lock_file(file.fileno(), LOCK_TIMEOUT_S)
        except BlockingIOError as error:
            raise RuntimeError(
                f"ranks of an earlier start have held {run.trainer_lock} for {LOCK_TIMEOUT_S:g} s; "
                "end their processes (`train_rank`) on the nodes that they ran on"
            ) from error
        engine.any(False)
        yield
