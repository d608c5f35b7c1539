"""Sweeps whose jobs a launcher of Hydra starts elsewhere."""

from __future__ import annotations

from omegaconf import DictConfig

from cluster.settings.file import to_config
from cluster.settings.hydra import _drive, _name
from cluster.supervisor.runner import work
from distill.config import check


def launch(stage: str, args: list[str], command: str) -> None:
    """Hands the jobs of a sweep to the launcher that `args` name, and waits for their ends.

    Raises:
        ConfigError: there is no such launcher, or it has no such setting.
        ChildProcessError: a job failed.
    """
    check("--multirun" in args or "-m" in args, "a launcher is for sweeps: add --multirun")

    def task(tree: DictConfig) -> None:
        work_elsewhere(stage, args, command, tree)

    _drive(task, args)


def work_elsewhere(stage: str, args: list[str], command: str, tree: DictConfig) -> None:
    """One job of a sweep, in a process of the launcher's.

    Raises:
        ChildProcessError: it failed. The process that waits for the jobs says so.
    """
    tree.run.name = _name(tree, args)
    config = to_config(tree)
    config.run.command = command
    code = work(stage, config)
    if code:
        raise ChildProcessError(
            f"{config.run.dir} failed with exit code {code}; its job's log says why"
        )
