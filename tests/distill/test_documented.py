"""Imports that a document has named work for ever, and the snippets of today's documents too."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What README.md and docs/formats.md named before the rooms.
BEFORE = [
    ("distill.sample", "load_student"),
    ("distill.checkpoint", "read_average"),
    ("distill.manifest", "latest_verified"),
]


def imports() -> list[tuple[str, str]]:
    """(module, name) of every import of ours in a Python block of a document."""
    found = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for module, names in re.findall(
                r"^from ((?:bowstring|distill|cluster)[\w.]*) import (.+)$",
                block,
                flags=re.MULTILINE,
            ):
                found += [(module, name.strip()) for name in names.split(",")]
    return found


@pytest.mark.parametrize(("module", "name"), [*BEFORE, *imports()])
def test_a_documented_import_works(module, name):
    assert callable(getattr(import_module(module), name))


def test_the_documents_are_read_at_all():
    assert ("bowstring", "load_student") in imports()
