"""`bowstring VERB ...`: the command line. Everything heavy is imported by the verb that needs it,
so --help is instant.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from functools import partial

import cluster.cli.verbs  # noqa: F401  registers all of VERBS
from cluster.cli.arguments import USAGE_ERROR, VERBS, Parser

INTERRUPTED = 130

FIRST_STEPS = """first steps:
  bowstring doctor
  bowstring run experiment=digits
  bowstring status runs/digits

`bowstring VERB --help` says more.
"""


def general() -> Parser:
    """The parser that knows all verbs; it is there for its help."""
    parser = Parser(
        prog="bowstring",
        usage="bowstring VERB [...]",
        description="Distils a rectified-flow image model into a student of 1-4 steps.",
        epilog=FIRST_STEPS,
    )
    parser.add_argument("--version", action="store_true", help="the version instead of a verb")
    verbs = parser.add_subparsers(
        title="verbs", metavar="VERB", parser_class=argparse.ArgumentParser
    )
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.words[0])
    return parser


def parse(args: list[str]) -> Callable[[], int]:
    """What one command line, without the program's name, asks for; it returns the exit code.

    Raises:
        SystemExit: with --help, and for a wrong flag or argument of a verb.
    """
    match args:
        case [verb, *rest] if verb in VERBS:
            return partial(VERBS[verb].work, VERBS[verb].read(rest))
        case ["help", verb, *_] if verb in VERBS:
            return partial(VERBS[verb].work, VERBS[verb].read(["--help"]))
        case ["-sc" | "--shell-completion", *_]:
            return partial(complete, args)
        case ["--version", *_]:
            return version
        case []:
            general().print_help()
            sys.exit(USAGE_ERROR)
        case ["-h" | "--help" | "help", *_]:
            general().print_help()
            sys.exit(0)
    near = difflib.get_close_matches(args[0], VERBS, n=1)
    way = f"did you mean {near[0]}?" if near else f"choose one of: {', '.join(VERBS)}"
    general().exit(USAGE_ERROR, f"error: there is no verb {args[0]}; {way}\n")


def complete(args: list[str]) -> int:
    """Answers a shell's request for completion."""
    from cluster.settings.hydra import complete as answer

    answer(args, tuple(VERBS))
    return 0


def version() -> int:
    """Prints the version."""
    from importlib.metadata import version as version_of

    print(f"bowstring {version_of('bowstring')}")
    return 0


def dispatch(args: list[str]) -> int:
    """Exit code of one command line, without the program's name."""
    return parse(args)()


def main() -> None:
    """Entry point: runs the command line and ends with its exit code."""
    work = parse(sys.argv[1:])  # help ends here, before anything is loaded
    from distill.checkpoint.manifest import CheckpointError
    from distill.config import ConfigError, LossyExport
    from distill.data.sidecar import CorruptShard

    code, message = 1, ""
    try:
        code = work()
    except ConfigError as error:
        code, message = USAGE_ERROR, str(error)
    except (CheckpointError, CorruptShard, LossyExport, OSError) as error:
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
