"""What stands behind a verb on the command line: flags, settings, the folder of a run.

Everything heavy is imported where it is needed, so --help is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.settings.schema import RunConfig
    from distill.run.dir import RunDir

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Flags of one verb; its help is ours, its errors are one sentence."""

    def __init__(self, verb: str, *names: str) -> None:
        """`names` are arguments that must be given, and switches like --json."""
        super().__init__(prog=f"bowstring {verb}", add_help=False, allow_abbrev=False)
        for name in names:
            self.add_argument(name, action="store_true" if name.startswith("--") else "store")

    def error(self, message: str) -> Any:
        """Ends with one sentence and exit code 2."""
        self.exit(USAGE_ERROR, f"error: {message}; see {self.prog} --help\n")


def split_force_new(args: list[str]) -> list[str]:
    """Arguments with `--force-new NAME` written as run.name=NAME."""
    from distill.config import check

    rest: list[str] = []
    pending = iter(args)
    for argument in pending:
        flag, equals, value = argument.partition("=")
        if flag != "--force-new":
            rest.append(argument)
            continue
        name = value if equals else next(pending, "")
        check(
            bool(name) and "=" not in name,
            "--force-new needs the name of the new run: --force-new NAME",
        )
        rest.append(f"run.name={name}")
    return rest


def read_settings(args: list[str]) -> list[RunConfig]:
    """Configurations from `RUN key=value ...` (an existing run) or from Hydra arguments (several
    with --multirun).
    """
    args = split_force_new(args)
    if args and not args[0].startswith("-") and "=" not in args[0]:
        from cluster.settings.file import load_config

        return [load_config(open_run(args[0]), args[1:])]
    from cluster.settings.hydra import compose

    return compose(args)


def open_run(folder: str) -> RunDir:
    """The run in an existing folder. Raises ConfigError with a sentence when there is none."""
    from distill.config import ConfigError
    from distill.run.dir import RunDir

    root = Path(folder.rstrip("/") or "/")
    if not root.is_dir():
        others = ", ".join(sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml")))
        raise ConfigError(
            f"there is no run at {root}" + (f"; there are: {others}" if others else "")
        )
    from cluster.settings.file import shard_location

    return RunDir(root, shard_location(RunDir(root)))
