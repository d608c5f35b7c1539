"""What hangs on a training as the configuration asks for it."""

from dataclasses import asdict
from typing import Any

from distill.config import TrainConfig
from distill.engine.engine import Engine
from distill.run.dir import RunDir
from distill.training.callbacks import Callback
from distill.training.log import Flops, TrainLog
from distill.training.loop import Source
from distill.training.saving import Checkpointer
from distill.training.timing import Profiler
from distill.training.trackers import TensorBoard, Wandb


def build_callbacks(
    engine: Engine,
    source: Source,
    config: TrainConfig,
    run: RunDir,
    origin: dict[str, Any],
    flops: Flops | None = None,
) -> list[Callback]:
    """Log, checkpoints, and the trackers and the profiler that are asked for.

    `origin` is what manifests say of the run; `flops` what a sample costs, if a formula knows.
    """
    log = TrainLog(engine, run, lambda: source.wait_s, flops)
    callbacks: list[Callback] = [log, Checkpointer(engine, run, config, origin, log.event)]
    if engine.rank == 0:
        callbacks.append(TensorBoard(run.tensorboard))
        if config.wandb:
            callbacks.append(Wandb(config.wandb, run, asdict(config), log.event))
    if config.profile:
        callbacks.append(Profiler(run.profile, engine.rank))
    return callbacks
