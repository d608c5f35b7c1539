"""Help comes from the parsers: all of it is there, it is there at once, and what the pages say of
the command line is what the parsers take.
"""

import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from cluster.cli.arguments import HYDRA_FLAGS, MAX_WIDTH, USAGE_ERROR, groups, setting_words
from cluster.cli.main import VERBS, general, parse
from cluster.settings.file import GROUPS
from cluster.settings.hydra import compose
from cluster.supervisor import runner
from tests.cluster.cli.test_main import bowstring, modules_after

ROOT = Path(__file__).parents[3]
CHILDREN = "children_user", "children_system"  # of the processor: it may be busy with others
PAGES = [ROOT / "README.md", ROOT / "slurm/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def loaded_by(args: list[str]) -> set[str]:
    """Top-level modules that a command line has loaded when it ends by itself."""
    return modules_after(
        "import sys\n"
        "from cluster.cli.main import main\n"
        f"sys.argv = ['bowstring', *{args}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0"
    )


@pytest.mark.parametrize("args", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_that_is_heavy(args):
    heavy = {"torch", "ray", "deepspeed", "numpy", "hydra", "omegaconf", "yaml", "distill"}
    assert loaded_by(args).isdisjoint(heavy)


def test_help_is_there_at_once(measured):
    before = os.times()
    result = bowstring("run", "--help")
    after = os.times()
    assert result.returncode == 0
    assert "bowstring run experiment=digits" in result.stdout
    user, system = (getattr(after, x) - getattr(before, x) for x in CHILDREN)
    measured(f"seconds of `bowstring run --help`: {user + system:.2f}")
    assert user + system < 0.5


def squashed(text: str) -> str:
    """Text without what wrapping adds."""
    return "".join(text.split())


def examples(verb):
    """Command lines of a verb's help."""
    first, *lines = VERBS[verb].words[2].splitlines()
    assert first == "examples:" and lines
    return [line.strip() for line in lines]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_every_argument_and_every_default(verb):
    """Behind every flag, after its words, stands what holds without it."""
    parser = VERBS[verb].parser()
    text = parser.format_help()
    assert squashed(VERBS[verb].words[1]) in squashed(text)
    for code in (0, 1, USAGE_ERROR, *VERBS[verb].codes):
        assert re.search(rf"^ +{code}  \S", text[text.index("exit codes:") :], re.MULTILINE)
    for action in parser._actions:
        assert set(action.option_strings) <= set(re.findall(r"(?<!\S)-[-\w]+", text))
        words = action.help % {"choices": ", ".join(action.choices or ())}
        if not action.option_strings or action.required or action.dest in ("help", "hydra"):
            assert squashed(words) in squashed(text)
        elif action.default is None:
            assert "(default: " in words and squashed(words) in squashed(text)
        else:
            default = "off" if action.default is False else action.default
            assert squashed(f"{words} (default: {default})") in squashed(text)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [40, 80, 300])
def test_help_fits_the_terminal(verb, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = VERBS[verb].parser().format_help()
    commands = set(examples(verb))
    prose = [line for line in text.splitlines() if line.strip() not in commands]
    widest = max(len(line) for line in prose if "usage:" not in line and "[flags]" not in line)
    assert widest <= (MAX_WIDTH if columns > MAX_WIDTH else max(columns, 80))


def test_the_list_of_verbs_says_what_each_does():
    text = " ".join(general().format_help().split())
    for name, verb in VERBS.items():
        assert f"{name} {verb.words[0]}" in text


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_are_command_lines(verb):
    for example in examples(verb):
        program, name, *args = shlex.split(example)
        assert (program, name) == ("bowstring", verb)
        options = VERBS[verb].read(args)
        if "experiment=" in example and "~" not in example:
            assert compose(setting_words(options))


def test_groups_of_settings_are_those_that_settings_have():
    assert set(groups()) == set(GROUPS)
    text = VERBS["run"].parser().format_help()
    for name, options in groups().items():
        assert f"{name}=" in text and set(options) <= set(re.findall(r"\w+", text))
    assert "digits" in groups()["experiment"] and "traflow" in groups()["objective"]


def test_flags_of_hydra_are_hydras():
    """A newer Hydra with other flags fails here."""
    theirs = {name for action in get_args_parser()._actions for name in action.option_strings}
    ours = {name for flag in HYDRA_FLAGS for name in flag.names}
    assert ours <= theirs
    left_out = {"--run", "-r", "--config-path", "-cp", "--experimental-rerun", "--version"}
    assert theirs - ours == {*left_out, "--help", "-h"}


def test_a_flag_of_hydra_comes_with_its_value():
    read = VERBS["run"].read(["--cfg", "job", "experiment=tiny", "-cd=x", "-m", "seed=0,1", "-i"])
    assert read.hydra == ["--cfg", "job", "-cd", "x", "-m", "-i"]
    assert read.settings == ["experiment=tiny", "seed=0,1"]


def test_hydra_says_of_itself():
    result = bowstring("run", "--hydra-help")
    assert result.returncode == 0 and "hydra" in result.stdout.lower()


def test_exit_codes_of_the_help_are_the_supervisors():
    codes = VERBS["run"].codes
    assert "not saved" in codes[runner.NOT_SAVED] and "Ctrl-C" in codes[130]


# -----------------------------------------------------------------------------------------------
# The pages


def test_the_table_of_verbs_is_of_all_verbs():
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(itertools.chain(*(re.findall(r"`(\w+)`", row) for row in rows))) == sorted(VERBS)


def command_lines(page: str) -> list[str]:
    """Commands of a page: in blocks of code, and `bowstring ...` within a line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(bowstring [^`]+)`", page.replace("\n", " "))
    return [line.strip() for line in (*lines, *inline) if line.strip().startswith("bowstring ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_pages_are_understood(page, capsys):
    """Each has a verb, and flags and arguments that this verb's parser takes."""
    for line in command_lines(page.read_text()):
        words = shlex.split(line, comments=True)[1:]
        if "|" in words:
            words = words[: words.index("|")]
        if not words or words[0] in ("VERB", "--help", "--version"):
            continue
        assert words[0] in VERBS, line
        given = {word.partition("=")[0] for word in words if re.match(r"-[-a-z]", word)}
        known = {
            name for action in VERBS[words[0]].parser()._actions for name in action.option_strings
        }
        assert given <= known, line


def test_pages_have_commands():
    assert sum(len(command_lines(page.read_text())) for page in PAGES) > 40


def test_help_of_a_verb_may_be_asked_for_first(capsys):
    for words in (["help", "run"], ["run", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            parse(words)
    first, second = capsys.readouterr().out.split("usage: bowstring run")[1:]
    assert first == second
