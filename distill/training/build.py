"""What hangs on a training as the configuration asks for it."""

from dataclasses import asdict
from typing import Any

from distill.config import TrainConfig
from distill.engine.engine import Engine
from distill.run.files import RunDir
from distill.training import callbacks, log, loop, saving, timing, trackers


def build_callbacks(
    engine: Engine,
    source: loop.Source,
    config: TrainConfig,
    run: RunDir,
    origin: dict[str, Any],
    flops: log.Flops | None = None,
) -> list[callbacks.Callback]:
    """Log, checkpoints, and the trackers and the profiler that are asked for.

    `origin` is what manifests say of the run; `flops` what a sample costs, if a formula knows.
    """
    record = log.TrainLog(engine, run, lambda: source.wait_s, flops)
    hooks: list[callbacks.Callback] = [
        record,
        saving.Checkpointer(run.checkpoints, engine, config, origin, record.event),
    ]
    if engine.rank == 0:
        hooks.append(trackers.TensorBoard(run.tensorboard))
        if config.wandb:
            hooks.append(trackers.Wandb(config.wandb, run, asdict(config), record.event))
    if config.profile:
        hooks.append(timing.Profiler(run.profile, engine.rank))
    return hooks
