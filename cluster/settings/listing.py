"""All settings of a run with type, default and what they are for: read off the dataclasses and the
comments behind their fields. `bowstring settings` prints it, docs/settings.md is it.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING as ASKED

from cluster.settings.schema import RunConfig
from distill.config import is_free
from distill.networks.config import NETWORKS, NetworkConfig
from distill.objectives.config import OBJECTIVES, ObjectiveConfig
from distill.teachers.config import TEACHERS, TeacherConfig

# What has a class of its own for each name: base, classes, and the setting that chooses
CHOICES: dict[type, tuple[dict[str, Any], str]] = {
    NetworkConfig: (NETWORKS, "student"),
    ObjectiveConfig: (OBJECTIVES, "objective"),
    TeacherConfig: (TEACHERS, "teacher.NAME.kind"),
}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: as on the command line; NAME stands for a name of the user's.
        of: the choices that have it, such as "objective=bezier"; "": every run has it.
        type: in words.
        default: of a new run, as it is written on the command line; "": there is none.
        words: what it is for.
        is_free: whether a resume may change it.
    """

    key: str
    of: str
    type: str
    default: str
    words: str
    is_free: bool


def settings() -> list[Setting]:
    """All of them, in the order of a config.yaml."""
    return [one for one in _below(RunConfig, "", "", "", False) if one.key != "run.command"]


def search(word: str) -> list[Setting]:
    """Those that have `word` in their key or in what they are for."""
    low = word.lower()
    return [one for one in settings() if low in f"{one.key} {one.of} {one.words}".lower()]


def _below(kind: Any, prefix: str, of: str, section: str, free: bool) -> Iterator[Setting]:
    """The settings of a dataclass below the key `prefix`, and of those that are nested in it."""
    hints, comments = get_type_hints(kind), _comments(kind)
    for one in fields(kind):
        key = f"{prefix}.{one.name}" if prefix else one.name
        inner, name = _inner(hints[one.name])
        below = key + name
        freed = free or is_free(one, section or one.name)
        if inner in CHOICES:
            yield from _variants(inner, below, freed)
        elif inner is not None:
            yield from _below(inner, below, of, section or one.name, freed)
        else:
            words = " ".join(comments.get(one.name, "").split())
            yield Setting(key, of, _type(hints[one.name]), _default(one), words, freed)


def _variants(base: type, prefix: str, free: bool) -> Iterator[Setting]:
    """Those that all classes of a choice have, then those that only some have."""
    classes, chooser = CHOICES[base]
    common = {one.name for one in fields(base)}
    yield from _below(base, prefix, "", "", free)
    rows: dict[Setting, list[str]] = {}
    for name, kind in classes.items():
        for row in _below(kind, prefix, "", "", free):
            if row.key.rpartition(".")[2] not in common:
                rows.setdefault(row, []).append(f"{chooser}={name}")
    for row, names in rows.items():
        yield Setting(row.key, ", ".join(names), row.type, row.default, row.words, row.is_free)


def _inner(hint: Any) -> tuple[Any, str]:
    """The dataclass that a type holds, if any, and what stands for its name in a key."""
    parts = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
    return (parts[0] if parts else None), (".NAME" if str(hint).startswith("dict") else "")


def _type(hint: Any) -> str:
    """A type in words: "int", "list of str"."""
    if hint is Any:
        return "number or list"
    text = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
    return re.sub(r"list\[(\w+)\]", r"list of \1", text).replace(" | None", " or null")


def _default(one: Any) -> str:
    """What a new run has, as the command line takes it."""
    value = one.default if one.default_factory is MISSING else one.default_factory()
    if value is MISSING or value == ASKED:
        return ""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float) and abs(value) >= 10**6:
        return f"{value:_}" if isinstance(value, int) else f"{value:g}".replace("+", "")
    return '""' if value == "" else str(value).replace("'", "").replace(", ", ",")


def _comments(kind: type) -> dict[str, str]:
    """The comment of every field: that behind it, or the lines above it. A subclass wins."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            found |= _own_comments(base)
    return found


def _own_comments(kind: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    lines, found = source.splitlines(), {}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None and node.end_col_offset is not None
            behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2]
            above: list[str] = []
            row = node.lineno - 2
            while not behind and lines[row].lstrip().startswith("#"):
                above.insert(0, lines[row].lstrip("# "))
                row -= 1
            if words := behind.strip() or " ".join(above):
                found[node.target.id] = words
    return found
