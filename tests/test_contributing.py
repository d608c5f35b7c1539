"""CONTRIBUTING.md against the tree: rooms, files, and the functions of its walks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACEHOLDERS = {"NAME", "name"}


def rooms(package: str) -> set[str]:
    """Folders and modules at the top of a package, but for what only keeps an old import alive."""
    top = ROOT / package
    folders = {f"{path.name}/" for path in top.iterdir() if (path / "__init__.py").exists()}
    return folders | {path.name for path in top.glob("*.py")} - {"__init__.py", "manifest.py"}


@pytest.mark.parametrize("package", ["bowstring", "cluster", "distill"])
def test_the_tree_has_a_sentence_for_every_room(package):
    tree = TEXT.partition("```\n")[2].partition("```")[0]
    block = re.split(r"^(?=\w+/)", tree, flags=re.MULTILINE)
    (lines,) = (part.splitlines()[1:] for part in block if part.startswith(f"{package}/"))
    found = dict(line.split(maxsplit=1) for line in lines if line.strip())
    assert set(found) == rooms(package)
    assert all(sentence.strip() for sentence in found.values())


def functions(path: Path) -> set[str]:
    """Functions and methods of a file: "solve", "TraFlow.loss"."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{n.name}" for n in methods} | {n.name for n in methods}
    return found


def steps() -> list[tuple[str, str]]:
    """(file, function) of every step of the two walks."""
    found, path = [], ""
    for line in TEXT.partition("## Two walks")[2].partition("\n## ")[0].splitlines():
        for word in re.findall(r"`([^`]+)`", line):
            if re.fullmatch(r"[\w/]+\.py:[\w.]+", word):
                path, word = word.split(":")
            if path and re.fullmatch(r"[A-Za-z_][\w.]*", word):
                found.append((path, word))
    return found


@pytest.mark.parametrize(("path", "function"), steps())
def test_a_step_of_a_walk_is_there(path, function):
    assert function in functions(ROOT / path)


def test_the_walks_are_read():
    assert len(steps()) > 20


def paths() -> list[str]:
    """Files and folders that the text names, braces expanded, placeholders left out."""
    found = set()
    for word in re.findall(
        r"`((?:distill|cluster|configs|tests|benchmarks|slurm)/[\w/.,{}-]+)`", TEXT
    ):
        inner = re.search(r"\{([^}]*)\}", word)
        for part in inner.group(1).split(",") if inner else [""]:
            found.add(word.replace(inner.group(0), part) if inner else word)
    return sorted(path for path in found if not PLACEHOLDERS & set(re.split(r"[/._]", path)))


@pytest.mark.parametrize("path", paths())
def test_a_file_that_is_named_exists(path):
    assert (ROOT / path).exists()
