"""What hangs on a training as the configuration asks for it."""

from dataclasses import asdict
from typing import Any

from distill.config import TrainConfig
from distill.engine.engine import Engine
from distill.run.files import RunDir
from distill.training import loop, saving, timing, trackers
from distill.training.callbacks import Callback
from distill.training.log import Flops, TrainLog


def build_callbacks(
    engine: Engine,
    source: loop.Source,
    config: TrainConfig,
    run: RunDir,
    origin: dict[str, Any],
    flops: Flops | None = None,
) -> list[Callback]:
    """Log, checkpoints, and the trackers and the profiler that are asked for.

    `origin` is what manifests say of the run; `flops` what a sample costs, if a formula knows.
    """
    log = TrainLog(engine, run, lambda: source.wait_s, flops)
    callbacks: list[Callback] = [
        log,
        saving.Checkpointer(run.checkpoints, engine, config, origin, log.event),
    ]
    if engine.rank == 0:
        callbacks.append(trackers.TensorBoard(run.tensorboard))
        if config.wandb:
            callbacks.append(trackers.Wandb(config.wandb, run, asdict(config), log.event))
    if config.profile:
        callbacks.append(timing.Profiler(run.profile, engine.rank))
    return callbacks
