"""`bowstring settings`: what settings there are, for a terminal and as a page."""

import difflib
from itertools import groupby

from rich import console, text

from cluster.settings.listing import Setting, search, settings
from distill.config import check

HEAD = """<!-- Written by `bowstring settings --page > docs/settings.md`; a test compares. -->
# Settings

Every setting of a run, as the command line takes it: `train.lr=3e-4`. `NAME` is a name of yours.
Defaults are those without an experiment or a preset; `bowstring run experiment=NAME --cfg job`
shows what is made of them. A setting marked **resume** may change when a run goes on; any other
belongs to the run, and another value is another run. `bowstring settings WORD` searches this list.
"""


def show(word: str) -> int:
    """Prints the settings that have `word`, in the width of the terminal.

    Raises:
        ConfigError: none has it.
    """
    found = search(word)
    near = difflib.get_close_matches(word, [one.key for one in settings()], n=1)
    way = f"; did you mean {near[0]}?" if near else "; `bowstring settings` lists all"
    check(len(found) > 0, f"no setting has {word} in its key or its words{way}")
    terminal = console.Console(highlight=False)
    for one in found:
        default = f" = {one.default}" if one.default else ""
        line = text.Text.assemble((one.key, "bold"), f"{default}  ({one.type})")
        line.append(f"  {one.of}" if one.of else "", style="dim")
        terminal.print(line, soft_wrap=not terminal.is_terminal)
        terminal.print(text.Text(f"    {said(one)}"), soft_wrap=not terminal.is_terminal)
    return 0


def said(one: Setting) -> str:
    """What a setting is for, and whether a resume may change it."""
    return one.words + (" (resume)" if one.is_free else "")


def page() -> str:
    """docs/settings.md."""
    parts = [HEAD]
    for section, group in groupby(settings(), lambda one: one.key.partition(".")[0]):
        parts += [
            f"\n## {section}\n",
            "| setting | type | default | what it is for |",
            "|---|---|---|---|",
        ]
        parts += [_row(one) for one in group]
    return "\n".join(parts) + "\n"


def _row(one: Setting) -> str:
    words = one.words.replace("|", "\\|")
    words += f" *Of {one.of}.*" if one.of else ""
    words += " **resume**" if one.is_free else ""
    default = f"`{one.default}`" if one.default else ""
    return f"| `{one.key}` | {one.type} | {default} | {words} |"
