"""The benchmark of the objectives runs, knows them all, and keeps apart what chooses."""

import json
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from benchmarks.objectives import plane, summary
from benchmarks.objectives.student import off_data
from distill.config import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    """benchmarks/objectives.py, whose name the folder beside it has too."""
    spec = spec_from_file_location("objectives_script", ROOT / "benchmarks" / "objectives.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_objective_has_a_row(script):
    """One teacher makes `bezier` what `traflow` is."""
    shipped = {path.stem for path in (ROOT / "configs" / "objective").glob("*.yaml")}
    assert set(script.OVERRIDES) == shipped - {"bezier"}


def test_what_chooses_is_not_held_out(script):
    assert not set(script.CHOOSING) & set(script.HELD_OUT)
    assert set(script.PROBLEMS) == set(script.CHOOSING) | set(script.HELD_OUT)


@pytest.mark.parametrize("name", plane.SHAPES)
def test_samples_of_a_shape_are_on_it_and_noise_is_not(name):
    data = plane.points(name, seed=99, index=0, num=2000)
    again, other = (plane.points(name, seed=99, index=index, num=2000) for index in (0, 1))
    assert torch.equal(data, again) and not torch.equal(data, other)
    assert off_data(other, data) < 0.03
    noise = 2 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    assert off_data(noise, data) > 0.2


def test_a_small_run_gives_tables_and_a_plot(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setattr(plane, "PRETRAIN", TrainConfig(max_steps=3, batch_size=64))
    whole = plane.plane_problem("moons", tmp_path, is_quick=False)
    problem = replace(whole, num_pairs=512, num_truth=64, steps=6)
    monkeypatch.setattr(script, "make_problem", lambda name, is_quick: problem)
    shipped = {name: script.shipped(name) for name in ("traflow", "progressive")}
    monkeypatch.setattr(script, "OVERRIDES", dict.fromkeys(shipped))
    monkeypatch.setattr(script, "shipped", shipped.__getitem__)
    todo = [(t, one) for t, one in script.plan(False, ["moons"], 1) if t == "equal compute"]
    assert [one.row for _, one in todo] == list(shipped)
    budget = 6 * shipped["progressive"].calls().in_forwards
    assert all(budget - 4 < one.forwards <= budget for _, one in todo)
    found = {
        "date": "today",
        "machine": "this one",
        "command": "a test",
        "minutes": 0,
        "cached": 0,
        "teachers": {"moons": script.teacher_rows("moons", False)},
        "rows": [script.row_of(table, one, script.run_one(one)) for table, one in todo],
    }
    found = json.loads(json.dumps(found))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- held_out: begin -->old<!-- held_out: end -->\nafter\n")
    summary.write(tmp_path, page, "held_out", found, summary.tables(found))
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "### moons, equal compute" in text and "@16" in text and "off data @1" in text
    assert "| progressive | 6 | 18 |" in text
    assert (tmp_path / "held_out.png").stat().st_size > 10_000
