"""Rules of CONTRIBUTING.md that a program can check."""

import ast
from pathlib import Path

import pytest

from tests.conftest import MACHINES

ROOT = Path(__file__).parent.parent
PACKAGES = ("bowstring", "cluster", "distill")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

MAX_FUNCTION_LINES = 60
SUPERVISOR = (
    "runner.py",
    "group.py",
    "session.py",
)  # where a failure becomes an exit code, or another start


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_function_fits_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node) <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_nothing_is_sniffed_unpickled_or_caught_broadly(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            assert node.id != "hasattr"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "pickle" or node.attr == "UnpicklingError"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            settings = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert settings.get("weights_only") == "True"
        if isinstance(node, ast.ExceptHandler) and path.name not in SUPERVISOR:
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("Exception", "BaseException", "everything")


def starts_ranks(path: Path) -> bool:
    """Whether the file calls `run_ranks`."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(ast.unparse(call.func).endswith("run_ranks") for call in calls)


def test_what_starts_ranks_does_so_in_one_process_of_pytest():
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if starts_ranks(path)]
    assert len(files) > 5
    names = [path.relative_to(ROOT).as_posix() for path in files]
    assert [name for name in names if not name.startswith(MACHINES)] == []
    assert all((ROOT / name).exists() for name in MACHINES)
