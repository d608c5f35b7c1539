"""`bowstring VERB ...`: the command line. Everything heavy is imported by the verb that needs it,
so --help is instant.

Exit codes: 0 done, 1 the work failed or an audit found something, 2 a wrong command line or
setting, 75 stopped as asked with steps lost, 130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.cli.arguments import USAGE_ERROR, Parser, open_run, read_settings, split_force_new
from cluster.cli.help import GENERAL, VERBS
from cluster.settings.hydra import split_launcher
from cluster.supervisor.runner import DISTIL, PIPELINE, work

INTERRUPTED = 130


# -----------------------------------------------------------------------------------------------
# Verbs: each takes its arguments and returns an exit code


def pipeline(verb: str, args: list[str]) -> int:
    """run, pretrain, generate, train: hands each configuration to the supervisor."""
    parser = Parser(verb, *(["--no-evaluation"] if verb == "run" else []))
    options, rest = parser.parse_known_args(args)
    stage = DISTIL if verb == "run" and options.no_evaluation else verb
    command = shlex.join(["bowstring", verb, *args])
    settings, launcher = split_launcher(split_force_new(rest))
    configs = read_settings(settings)
    from cluster.state.done import check_all, unfinished

    check_all(configs)  # refused here, before anything heavy is loaded
    if launcher:
        from cluster.cli.sweep import launch

        launch(stage, [*settings, *launcher], command)
        return 0
    configs = unfinished(configs) if stage == "run" else configs
    for config in configs:
        config.run.command = command
        code = work(stage, config)
        if code:
            return code
    return 0


def evaluate(args: list[str]) -> int:
    """Evaluates a run and prints where the report is."""
    parser = Parser("evaluate", "run")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(args)
    run = open_run(options.run)
    from cluster.settings.file import load_config
    from cluster.supervisor.runner import evaluate as evaluate_run

    return evaluate_run(load_config(run, options.overrides))


def sample(args: list[str]) -> int:
    """Draws pictures."""
    parser = Parser("sample", "run")
    parser.add_argument("--nfe", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=_labels, default=None)
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(_join_labels(args))
    run = open_run(options.run)
    from distill.sample import sample_run

    path = sample_run(run, options.nfe, options.seed, options.labels, options.num, options.out)
    picture = path.with_suffix(".png")
    print(path, *([picture] if picture.exists() else []), sep="\n")
    return 0


def _labels(text: str) -> list[int]:
    """Comma-separated classes."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list like 0,1,2") from None


def _join_labels(args: list[str]) -> list[str]:
    """`--labels -1,2` as `--labels=-1,2`, which argparse does not take for a flag."""
    return "\0".join(args).replace("--labels\0-", "--labels=-").split("\0") if args else []


def export(args: list[str]) -> int:
    """Writes the student, or its trajectories for FastGen, as files."""
    parser = Parser("export", "run")
    parser.add_argument("--format", choices=["student", "fastgen"], default="student")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--average", choices=["evaluation"], default="evaluation")
    options = parser.parse_args(args)
    run = open_run(options.run)
    if options.format == "fastgen":
        from distill.export.fastgen import export_fastgen as write
    else:
        from distill.export.student import export_run as write
    print(write(run, options.out or run.root / options.format))
    return 0


def status(args: list[str]) -> int:
    """Shows a run's progress."""
    parser = Parser("status", "run", "--json")
    parser.add_argument("--watch", type=float, nargs="?", const=2.0, default=None)
    options = parser.parse_args(args)
    run = open_run(options.run)
    from cluster.inspect.view import show

    show(run, as_json=options.json, every_s=options.watch)
    return 0


def verify(args: list[str]) -> int:
    """Audits a run; 1 when anything is wrong."""
    parser = Parser("verify", "run", "--json")
    options = parser.parse_args(args)
    run = open_run(options.run)
    from cluster.inspect.verify import audit
    from cluster.inspect.view import show_audit

    return show_audit(audit(run), as_json=options.json)


def estimate(args: list[str]) -> int:
    """Prints what a configuration will cost."""
    parser = Parser("estimate", "--json")
    parser.add_argument("--flops", type=float, default=None)
    options, rest = parser.parse_known_args(args)
    configs = read_settings(rest)
    from cluster.plan.estimate import show

    for config in configs:
        show(config, options.flops, as_json=options.json)
    return 0


def doctor(args: list[str]) -> int:
    """Checks this machine; 1 when a run could not work here."""
    parser = Parser("doctor", "--json")
    parser.add_argument("--dir", type=Path, default=Path("runs"))
    options = parser.parse_args(args)
    from cluster.inspect.doctor import show

    return show(options.dir, as_json=options.json)


def scale(args: list[str]) -> int:
    """Sets the number of teacher workers of a live run."""
    parser = Parser("scale")
    parser.add_argument("run")
    parser.add_argument("workers", type=int)
    options = parser.parse_args(args)
    run = open_run(options.run)
    from cluster.slurm.jobs import read_ids
    from cluster.state.lock import is_live
    from cluster.state.workers import write_target
    from distill.config import check

    if read_ids(run):
        from cluster.settings.file import load_config
        from cluster.slurm.submit import scale as scale_jobs

        scale_jobs(load_config(run), run, options.workers)
        print(f"{run.root}: teacher workers wanted: {options.workers}; see `bowstring status`")
        return 0
    check(
        is_live(run),
        f"{run.root} is not running; start it with cluster.teachers.num_workers={options.workers}",
    )
    write_target(run, options.workers)
    print(f"{run.root}: teacher workers wanted: {options.workers}; see `bowstring status`")
    return 0


def submit(args: list[str]) -> int:
    """Submits the Slurm jobs of a run, or prints them."""
    parser = Parser("submit", "--dry-run")
    options, rest = parser.parse_known_args(args)
    configs = read_settings(rest)
    from cluster.slurm.submit import submit as submit_run

    for config in configs:
        submit_run(config, options.dry_run)
    return 0


def stop(args: list[str]) -> int:
    """Saves a live run and ends it."""
    options = Parser("stop", "run").parse_args(args)
    from cluster.slurm.submit import stop as stop_run

    print(*stop_run(open_run(options.run)), sep="\n")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "evaluate": evaluate,
    "sample": sample,
    "export": export,
    "submit": submit,
    "scale": scale,
    "stop": stop,
    "status": status,
    "verify": verify,
    "estimate": estimate,
    "doctor": doctor,
}


def dispatch(args: list[str]) -> int:
    """Exit code of one command line, without the program's name."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(GENERAL, end="")
        return 0 if args else USAGE_ERROR
    if args[0] in ("-sc", "--shell_completion"):
        from cluster.settings.hydra import complete

        complete(args, tuple(VERBS))
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"bowstring {version('bowstring')}")
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        print(f"error: there is no verb {verb}; choose one of: {', '.join(VERBS)}", file=sys.stderr)
        return USAGE_ERROR
    if "-h" in rest or "--help" in rest:
        print(VERBS[verb], end="")
        return 0
    return pipeline(verb, rest) if verb in PIPELINE else COMMANDS[verb](rest)


def main() -> None:
    """Entry point: runs the command line and ends with its exit code."""
    from distill.checkpoint.manifest import CheckpointError
    from distill.config import ConfigError
    from distill.data.sidecar import CorruptShard

    code, message = 1, ""
    try:
        code = dispatch(sys.argv[1:])
    except ConfigError as error:
        code, message = USAGE_ERROR, str(error)
    except (CheckpointError, CorruptShard, OSError) as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("None", "cluster", "distill"):
            raise
        message = f"the package {error.name} is missing; pip install 'bowstring[train]'"
    except KeyboardInterrupt:
        code = INTERRUPTED
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
