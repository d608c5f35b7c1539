"""From a verb's configuration to the supervisor, in this process or in a job that a launcher of
Hydra starts elsewhere.
"""

from omegaconf import DictConfig

from cluster.settings import file, hydra, schema
from distill.config import check


def work(stage: str, config: schema.RunConfig) -> int:
    """Exit code of the supervisor's function: `run`, `pretrain`, `generate`, `train`, or `distil`,
    which is `run` without evaluation. A name, so that the job of a launcher can be told it.
    """
    from cluster.supervisor import runner  # ray and torch: not for the process that waits for jobs

    functions = (runner.run, runner.pretrain, runner.generate, runner.train, runner.distil)
    names = ("run", "pretrain", "generate", "train", "distil")
    return dict(zip(names, functions, strict=True))[stage](config)


def launch(stage: str, args: list[str], command: str) -> None:
    """Hands the jobs of a sweep to the launcher that `args` name, and waits for their ends.

    Raises:
        ConfigError: there is no such launcher, or it has no such setting.
        ChildProcessError: a job failed.
    """
    check("--multirun" in args or "-m" in args, "a launcher is for sweeps: add --multirun")

    def task(tree: DictConfig) -> None:
        work_elsewhere(stage, args, command, tree)

    hydra.drive(task, args)


def work_elsewhere(stage: str, args: list[str], command: str, tree: DictConfig) -> None:
    """One job of a sweep, in a process of the launcher's.

    Raises:
        ChildProcessError: it failed. The process that waits for the jobs says so.
    """
    tree.run.name = hydra.name_of(tree, args)
    config = file.to_config(tree)
    config.run.command = command
    code = work(stage, config)
    if code:
        raise ChildProcessError(
            f"{config.run.dir} failed with exit code {code}; its job's log says why"
        )
