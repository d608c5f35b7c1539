"""Verbs, and what stands behind one on the command line: flags, settings, the folder of a run.

The parser of a verb is the only source of its help. Nothing heavy is imported at the top, so that
--help is instant.
"""

import argparse
import inspect
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from cluster.settings.schema import RunConfig
    from distill.run.files import RunDir

USAGE_ERROR = 2
MAX_WIDTH = 100  # of help, in characters, on a wider terminal too
CODES = {0: "done", 1: "it failed", USAGE_ERROR: "a wrong command line or setting"}


@dataclass(frozen=True)
class Argument:
    """One argument: what argparse's add_argument takes."""

    names: tuple[str, ...]
    options: dict[str, Any]


def argument(*names: str, **options: Any) -> Argument:
    """An argument of a verb. A flag whose default is None says in its help what that means."""
    return Argument(names, options)


RUN = argument("run", metavar="RUN", help="folder of a run, such as runs/digits")
JSON = argument("--json", action="store_true", help="one JSON object instead of text")


@dataclass(frozen=True)
class Verb:
    """One verb of the command line, as `verb` registers it.

    Attributes:
        work: does it, and returns an exit code. Heavy imports are inside it.
        arguments: in the order of the help.
        takes_settings: it is about a configuration: `experiment=NAME ...` or `RUN key=value ...`.
        codes: exit codes that mean something else, or more, than in CODES.
    """

    work: "Work"
    arguments: tuple[Argument, ...]
    takes_settings: bool
    codes: Mapping[int, str]

    @property
    def words(self) -> tuple[str, str, str]:
        """A few words for the list of verbs; what it does, in paragraphs; its examples."""
        summary, *about, examples = inspect.getdoc(self.work).split("\n\n")  # type: ignore[union-attr]
        return summary, "\n\n".join(" ".join(part.split()) for part in about), examples

    def parser(self) -> "Parser":
        """The parser of its arguments."""
        name, codes, (_, about, examples) = self.work.__name__, {**CODES, **self.codes}, self.words
        meanings = "\n".join(f"  {code:3d}  {codes[code]}" for code in sorted(codes))
        parser = Parser(
            prog=f"bowstring {name}",
            usage=SETTINGS_USAGE.format(verb=name) if self.takes_settings else None,
            description=about,
            epilog=f"{examples}\n\nexit codes:\n{meanings}",
        )
        for one in self.arguments:
            parser.add_argument(*one.names, **one.options)
        if self.takes_settings:
            add_settings(parser)
        return parser

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """Its arguments, and the whole `command`."""
        options = self.parser().read(args)
        options.command = shlex.join(["bowstring", self.work.__name__, *args])
        return options


VERBS: dict[str, Verb] = {}  # in the order of the list that `bowstring --help` prints
Work = Callable[[argparse.Namespace], int]


def verb(
    *arguments: Argument, takes_settings: bool = False, codes: Mapping[int, str] | None = None
) -> Callable[[Work], Work]:
    """Registers a function as the verb of its name. Its docstring is the help: a line for the list
    of verbs, then paragraphs, and last `examples:` with a command a line.
    """

    def register(work: Work) -> Work:
        VERBS[work.__name__] = Verb(work, arguments, takes_settings, codes or {})
        return work

    return register


class Parser(argparse.ArgumentParser):
    """A parser whose help shows every default, and whose errors are one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """The arguments, in any order. Ends with one sentence for an unknown one."""
        options, unknown = self.parse_known_intermixed_args(_join_negative(args))
        for word in unknown:
            if word.startswith("-"):
                self.error(self._unknown_flag(word.partition("=")[0]))
        if unknown:
            self.error(f"{' '.join(unknown)} is not understood")
        return options

    def _unknown_flag(self, flag: str) -> str:
        """What to say of a flag that does not exist."""
        from difflib import get_close_matches

        known = {n.lstrip("-"): n for action in self._actions for n in action.option_strings}
        near = get_close_matches(flag.lstrip("-"), known, n=1)
        return f"there is no flag {flag}" + (f"; the nearest is {known[near[0]]}" if near else "")

    def error(self, message: str) -> NoReturn:
        """Ends with one sentence and exit code 2."""
        self.exit(USAGE_ERROR, f"error: {message}; see {self.prog} --help\n")


def _join_negative(args: Sequence[str]) -> list[str]:
    """`--labels -1,2` as `--labels=-1,2`, which argparse does not take for a flag."""
    joined: list[str] = []
    for word in args:
        if joined and joined[-1].startswith("--") and re.match(r"-\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


class _Formatter(argparse.HelpFormatter):
    """Defaults behind every flag; lines of a text that are indented stay as they are."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, MAX_WIDTH) - 2
        super().__init__(prog, max_help_position=26, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = not action.option_strings or action.default in (None, argparse.SUPPRESS)
        if no_default or isinstance(action, PassedOn):
            return action.help
        return f"{action.help} (default: {'off' if action.default is False else '%(default)s'})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(_wrap(indent, line, width) for line in text.splitlines())


def _wrap(indent: str, line: str, width: int) -> str:
    """`line` in lines of `width`: a column goes on below itself, a command stays in one piece."""
    column = re.match(r" *\S.*?  +", line)
    if line.startswith(" ") and not column:
        return indent + line
    return textwrap.fill(
        indent + line,
        width,
        subsequent_indent=indent + " " * len(column[0] if column else ""),
        break_on_hyphens=False,
        break_long_words=False,
    )


# -----------------------------------------------------------------------------------------------
# Settings

SETTINGS_USAGE = """bowstring {verb} experiment=NAME [group=option ...] [key=value ...] [flags]
       bowstring {verb} RUN [key=value ...] [flags]"""

SETTINGS = """Without RUN, the name of an experiment and what differs from it, in Hydra's words:
  key=value             train.max_steps=100, teacher.pretrained.guidance=2.0; `--cfg job` shows all
  run.dir=FOLDER        where the run lives (default: runs/<name>)
  hydra/launcher=NAME   with --multirun: the runs as jobs of a launcher, such as submitit_slurm
  group=option          a file of settings:
"""

HYDRA_FLAGS = (
    argument("-m", "--multirun", nargs=0, help="one run per combination: seed=0,1,2"),
    argument("-cd", "--config-dir", nargs=1, metavar="FOLDER", help="more groups and options"),
    argument(
        "-c",
        "--cfg",
        nargs=1,
        choices=["job", "hydra", "all"],
        metavar="WHAT",
        help="prints the composed settings and stops: %(choices)s",
    ),
    argument("-p", "--package", nargs=1, metavar="KEY", help="with --cfg: only those below KEY"),
    argument("--resolve", nargs=0, help="with --cfg: references resolved"),
    argument(
        "-i",
        "--info",
        nargs="?",
        choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"],
        metavar="WHAT",
        help="prints how Hydra composes and stops: %(choices)s (default: all)",
    ),
    argument("-cn", "--config-name", nargs=1, metavar="NAME", help="root file (default: config)"),
    argument(
        "-sc",
        "--shell-completion",
        nargs=0,
        help='completion: eval "$(bowstring run -sc install=bash)"',
    ),
    argument("--hydra-help", nargs=0, help="what Hydra says of itself, alone"),
)


class PassedOn(argparse.Action):
    """A flag of Hydra's: kept as it stands, with its value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        words = [values] if isinstance(values, str) else list(values or [])
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), option_string, *words])


def groups() -> dict[str, list[str]]:
    """Options of every group of settings, as the folder configs/ has them."""
    from importlib.resources import files

    found = {}
    for folder in files("bowstring_configs").iterdir():
        if folder.is_dir():
            names = sorted(file.name for file in folder.iterdir())
            found[folder.name] = [n.removesuffix(".yaml") for n in names if n.endswith(".yaml")]
    return {name: found[name] for name in sorted(found) if found[name]}


def add_settings(parser: Parser) -> None:
    """Adds what a verb takes that is about a configuration; `read_settings` reads it."""
    lines = [f"    {name + '=':13s} {' '.join(options)}" for name, options in groups().items()]
    own = parser.add_argument_group("settings", SETTINGS + "\n".join(lines))
    own.add_argument(
        "settings", nargs="*", metavar="RUN", help="a run that exists: its settings, then key=value"
    )
    parser.add_argument(
        "--force-new",
        metavar="NAME",
        type=_new_name,
        help="a new run NAME instead of the one that settings or RUN name (default: none)",
    )
    hydra = parser.add_argument_group("flags of Hydra")
    for flag in HYDRA_FLAGS:
        hydra.add_argument(*flag.names, action=PassedOn, dest="hydra", default=[], **flag.options)


def _new_name(text: str) -> str:
    """Name of a run."""
    if not text or "=" in text:
        raise argparse.ArgumentTypeError(f"'{text}' is no name for a new run")
    return text


def setting_words(options: argparse.Namespace) -> list[str]:
    """What the command line says of settings, in Hydra's words; --force-new as run.name=NAME."""
    name = [f"run.name={options.force_new}"] if options.force_new else []
    return [*options.settings, *name, *options.hydra]


def read_settings(words: list[str]) -> "list[RunConfig]":
    """Configurations from `RUN key=value ...` (an existing run) or from Hydra arguments (several
    with --multirun).
    """
    first = words[0] if words else "-"
    # A job of a sweep has its values in its name: runs/tiny-seed=0
    if not first.startswith("-") and ("=" not in first or Path(first).is_dir()):
        from cluster.settings.file import load_config

        return [load_config(open_run(first), words[1:])]
    from cluster.settings.hydra import compose
    from distill.networks.config import SameAsTeacherConfig

    configs = compose(words)
    if any(isinstance(config.student, SameAsTeacherConfig) for config in configs):
        from cluster.supervisor.stages import with_student

        configs = [with_student(config) for config in configs]
    return configs


def open_run(folder: str) -> "RunDir":
    """The run in an existing folder. Raises ConfigError with a sentence when there is none."""
    from distill.config import ConfigError
    from distill.run.files import RunDir

    root = Path(folder.rstrip("/") or "/")
    if not root.is_dir():
        others = ", ".join(sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml")))
        raise ConfigError(
            f"there is no run at {root}" + (f"; there are: {others}" if others else "")
        )
    from cluster.settings.file import shard_location

    return RunDir(root, shard_location(RunDir(root)))
