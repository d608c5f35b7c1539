"""A class of this package as source code that stands alone.

A folder for others must not need Bowstring, and a second hand-written network would drift away from
the first. So the file beside the weights is made of the very lines of ours: the class, and in front
of it every function, class and constant that it takes from this package, from whatever module.
"""

import ast
import inspect
import sys
from collections import defaultdict
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

OURS = __name__.partition(".")[0]
UNKNOWN = ("jaxtyping", OURS)  # what annotations may name; they are not evaluated


class Standalone(NamedTuple):
    """Source that stands alone: `imports`, and below them `body`."""

    imports: str
    body: str


def standalone(*roots: Any) -> Standalone:
    """Source of some classes of this package and of all that they need of it.

    It is to stand below `from __future__ import annotations`.
    """
    found = _Found()
    for root in roots:
        found.take(sys.modules[root.__module__], root.__name__)
    named = [f"from {module} import {', '.join(sorted(n))}" for module, n in found.named.items()]
    return Standalone("\n".join([*sorted(found.whole), *sorted(named)]), "\n\n\n".join(found.parts))


class _Found:
    """What was found so far.

    Attributes:
        parts: source, each after those it needs.
        whole: import statements of modules.
        named: what is imported of a module, by module.
    """

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.whole: set[str] = set()
        self.named: dict[str, set[str]] = defaultdict(set)
        self._done: dict[str, ModuleType] = {}

    def take(self, module: ModuleType, name: str) -> None:
        """Adds what `module` calls `name`, after all that it needs."""
        if name in self._done:
            assert self._done[name] is module, f"two modules have a {name}"
            return
        self._done[name] = module
        top = _top_level(module)
        node = top.defined[name]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        lines = top.lines[first - 1 : node.end_lineno]
        annotations = _annotations(node)
        for use in ast.walk(node):
            match use:
                case ast.Name(id=word):
                    self._name(module, word, use in annotations)
                case ast.Attribute(value=ast.Name(id=alias), attr=word) if use not in annotations:
                    target = _submodule(top.imported.get(alias))
                    if target is not None:  # a name through a module of ours stands alone here
                        self.take(target, word)
                        row = use.lineno - first
                        lines[row] = lines[row].replace(f"{alias}.{word}", word)
        self.parts.append("\n".join(lines))

    def _name(self, module: ModuleType, name: str, is_annotation: bool) -> None:
        """Adds what a name means; of ours nothing that an annotation alone names."""
        top = _top_level(module)
        if name in top.defined and not is_annotation:
            self.take(module, name)
        elif name in top.imported:
            origin, attribute = top.imported[name]
            if origin.partition(".")[0] not in UNKNOWN:
                alias = "" if name in (attribute, origin) else f" as {name}"
                if attribute is None:
                    self.whole.add(f"import {origin}{alias}")
                else:
                    self.named[origin].add(f"{attribute}{alias}")
            elif attribute and not is_annotation and _submodule(top.imported[name]) is None:
                self.take(sys.modules[origin], attribute)


class _TopLevel(NamedTuple):
    """A module by its top level.

    Attributes:
        lines: its source.
        defined: function, class or constant by name.
        imported: (module, what of it or None) by the name that an import gives it.
    """

    lines: list[str]
    defined: dict[str, ast.stmt]
    imported: dict[str, tuple[str, str | None]]


@cache
def _top_level(module: ModuleType) -> _TopLevel:
    source = inspect.getsource(module)
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, tuple[str, str | None]] = {}
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                defined[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)]):
                defined[name] = node
            case ast.Import(names=names):
                imported |= {alias.asname or alias.name: (alias.name, None) for alias in names}
            case ast.ImportFrom(module=str(origin), names=names):
                imported |= {alias.asname or alias.name: (origin, alias.name) for alias in names}
    return _TopLevel(source.splitlines(), defined, imported)


def _submodule(origin: tuple[str, str | None] | None) -> ModuleType | None:
    """The module of ours that `from a import b` has brought, None where it was something else."""
    if origin is None or origin[0].partition(".")[0] != OURS:
        return None
    return sys.modules.get(".".join(part for part in origin if part))


def _annotations(node: ast.AST) -> set[ast.AST]:
    """All parts of the annotations in a definition."""
    found = [getattr(n, kind, None) for n in ast.walk(node) for kind in ("annotation", "returns")]
    return {part for annotation in found if annotation for part in ast.walk(annotation)}
