"""The pages against the code: names, sentences, and the objective of docs/objectives.md."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import bowstring

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_names_of_the_package_in_the_pages_are_there():
    code = "\n".join(block for page in PAGES for block in blocks(page))
    used = set(re.findall(r"\bbowstring\.(\w+)", code))
    assert {"load_teacher", "train", "compare", "LossTerms"} <= used <= set(bowstring.__all__)
    listed = re.findall(r"^        - (\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(bowstring.__all__)


def test_the_objective_of_the_page_trains(finished_run):
    (block,) = blocks(ROOT / "docs/objectives.md")
    names: dict = {}
    exec(block.replace("runs/digits", str(finished_run.root)), names)
    student, teacher = names["student"], names["teacher"]
    assert student.meta["objective"] == "Middle" and student.meta["step"] == 50
    fresh = bowstring.make_student(teacher)
    (before,), (after,) = (bowstring.compare(s, teacher, [2], 64) for s in (fresh, student))
    assert after.student < before.student


def sentences() -> list[str]:
    """What docs/troubleshooting.md quotes."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    return re.findall(r'^\| "([^"]+)" \|', text, re.MULTILINE)


def literals() -> str:
    """All strings of the code, one a line; what is put into one is a blank."""
    found = []
    for package in ("bowstring", "cluster", "distill"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else " " for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_a_sentence_that_leads_somewhere_is_one_that_is_said():
    said = literals()
    assert len(sentences()) > 20
    assert [words for words in sentences() if words not in said] == []


def in_nav(tree) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [page for part in parts for page in in_nav(part)]


def test_the_list_for_machines_has_every_page_of_the_site():
    """Links are checked where the site is built, by `make lint`."""
    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text())
    pages = in_nav(yaml.safe_load(text)["nav"])
    listed = re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs/llms.txt").read_text())
    assert sorted(listed) == sorted(pages)
    assert {page.name for page in PAGES[1:]} >= set(pages)


@pytest.mark.parametrize("first", ["![Handwritten digits", "make demo", "make test"])
def test_the_readme_begins_with_its_picture_and_two_commands(first):
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    assert first in text[:1800]
