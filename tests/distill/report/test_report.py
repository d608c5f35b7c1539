"""The report: one file that needs nothing else, whatever is missing."""

import json
import re
from dataclasses import replace
from html import unescape

import pytest
from PIL import Image

from distill.evaluation.config import EvalConfig
from distill.evaluation.evaluate import evaluate
from distill.report.cost import train_device_s
from distill.report.sections import (
    claim,
    duration,
    headline,
    read_facts,
    render,
    row_name,
    size,
    spread,
    write_report,
)
from distill.run.events import Resume, replay
from distill.run.files import RunDir, write_atomic
from distill.run.measured import Metrics, read_results

COMMAND = "bowstring run experiment=digits run.name='<tiny>'"
SECTIONS = ["pictures", "quality", "use", "loss", "speed", "teachers", "cost", "run"]
SECTIONS += ["configuration", "command"]


@pytest.fixture(scope="module")
def page(finished_run, data, teachers):
    evaluation = EvalConfig(
        num_samples=500, nfe=[1], teacher_nfe=[2], euler_nfe=[1, 4], reference_steps=4
    )
    evaluate(finished_run, data, teachers, evaluation, "traflow", "cpu")
    write_atomic(finished_run.config, b"seed: 0\n")
    return write_report(finished_run, COMMAND).read_text()


def test_the_page_needs_nothing_from_outside(page):
    assert "http" not in page
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "<script" not in page


def test_every_section_has_its_content(page):
    assert re.findall(r'<section id="(\w+)"><h2>\w', page) == SECTIONS
    assert 'class="missing"' not in page
    assert page.count("<svg") == 6 and page.count("<img") == 7 * 10
    assert "seed: 0" in page
    assert f"<pre>{COMMAND}</pre>" in unescape(page)


def test_what_a_run_holds_cannot_become_part_of_the_page(finished_run, page):
    """Names, objective, command, settings and versions are text, whatever is in them."""
    evil = "<script>alert(1)</script>&amp;\"'"
    facts = read_facts(finished_run, f"bowstring run experiment={evil}")
    results = replace(
        facts.results,
        objective=f"objective {evil}",
        frechet_name=f"distance {evil}",
        reference=replace(facts.results.reference, name=f"images {evil}"),
        extractor=replace(facts.results.extractor, name=f"extractor {evil}", sha256=evil),
        teacher=tuple(replace(row, solver=f"solver {evil}") for row in facts.results.teacher),
    )
    facts = replace(
        facts,
        name=f"run {evil}",
        results=results,
        record=replace(facts.record, hash=evil, versions={"torch": f"version {evil}"}),
        config=f"teacher: {{'name {evil}': {{path: '{evil}'}}}}",
        metrics=[replace(m, terms={f"term {evil}": m.loss}) for m in facts.metrics],
    )
    text = render(facts)
    assert "<script" not in text and evil not in text
    starts = ("run", "objective", "distance", "images", "extractor", "solver", "version", "term")
    for start in (*starts, "name"):
        assert f"{start} {evil}" in unescape(text), start
    tags = re.compile(r"</?([a-z]\w*)")
    assert set(tags.findall(text)) <= set(tags.findall(page))


def test_the_numbers_are_those_of_results_json(page, finished_run):
    tree, results = json.loads(finished_run.results.read_text()), read_results(finished_run)
    table = page[page.index("distance to teacher</th>") :]
    lines = [
        [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", line)]
        for line in re.findall(r"<tr.*</tr>", table[: table.index("</table>")])
    ]
    rows = tree["student"] + tree["teacher"]
    names = [row_name(row, results) for row in results.student + results.teacher]
    for cells, row, name in zip(lines, rows, names, strict=True):
        keys = ("nfe", "distance_to_teacher", "seconds_per_1000", "frechet")
        assert cells[0] == name
        assert cells[-1] == spread(row.get("kid"), row.get("kid_std"))
        for cell, key in zip(cells[1:-1], keys, strict=True):
            if key in row:
                assert float(cell.replace(",", "")) == pytest.approx(row[key], rel=5e-3), key
            else:
                assert cell == "-"
    assert f"{results.n:,}\nsamples of seed {results.seed}," in page
    assert f"<td>{results.cost.teacher_nfe:,}</td>" in page


def test_figures_have_the_ink_of_the_page(page):
    """So that they can be read on a dark one: black is nowhere said."""
    for figure in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "currentColor" in figure
        assert not re.search(r"(fill|stroke): ?(#000|black)", figure)


def test_the_time_of_a_step_is_split(page):
    for row in (
        ("forward", "400 ms", "88.9%"),
        ("data", "50 ms", "11.1%"),
        ("work, last", "4e+09 FLOP/s", "12.5% of the peak of the devices"),
        ("peak memory of a rank", size(3_000_000_000), ""),
    ):
        assert "".join(f"<td>{cell}</td>" for cell in row) in page


def test_ids_of_the_figures_do_not_collide(page):
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clips) == len(set(clips)) > 0


def test_an_empty_run_gets_a_page_that_says_what_is_missing(tmp_path):
    run = RunDir(tmp_path / "empty")
    page = write_report(run, "").read_text()
    assert page.count('class="missing"') == len(SECTIONS)
    assert "Not evaluated yet" in page


def test_the_overview_has_the_teacher_and_three_student_rows(page, finished_run):
    with Image.open(finished_run.samples / "overview.png") as picture:
        assert picture.width > 2 * picture.height


def test_the_headline_names_the_evaluations_the_teacher_needs(finished_run, page):
    facts = read_facts(finished_run, "")
    (student,) = facts.results.student
    rows = [replace(row, distance_to_teacher=0.16 / row.nfe) for row in facts.results.teacher]
    results = replace(
        facts.results, student=(replace(student, distance_to_teacher=0.05),), teacher=tuple(rows)
    )
    assert headline(replace(facts, results=results)).endswith(
        "The teacher's Euler solver needs 4 for that."
    )


def test_the_claim_is_for_who_reads_no_further(finished_run, page):
    """Evaluations and seconds of the teacher's finest row over the student's first."""
    facts = read_facts(finished_run, "")
    (student,), (teacher, *_) = facts.results.student, facts.results.teacher
    slow = replace(teacher, nfe=64, seconds_per_1000=12.3)
    fast = replace(student, seconds_per_1000=0.3)
    results = replace(facts.results, student=(fast,), teacher=(teacher, slow))
    assert claim(replace(facts, results=results)).startswith(
        "64 network evaluations → 1 evaluation: 41 times faster,"
    )
    slower = replace(results, student=(replace(fast, seconds_per_1000=20.0),))
    assert "faster" not in claim(replace(facts, results=slower))
    assert claim(replace(facts, results=None)) == ""


def test_a_spread_stands_beside_its_number():
    assert spread(-0.00081, 0.0021) == "-0.0008 ± 0.0021"
    assert spread(12.0, 3.0) == "12.0 ± 3.0"
    assert (spread(0.5, None), spread(None, None)) == ("0.5", "-")


def test_the_page_says_when_how_long_and_how_often_it_was_started(finished_run):
    facts = read_facts(finished_run, "")
    history = replay([Resume(0, 2, time=0.0), Resume(10, 2, time=3600.0)])
    metrics = [Metrics(20, lr=1e-3, grad_norm=0.5, world_size=2, time=5400.0)]
    text = render(replace(facts, history=history, metrics=metrics))
    for row in (
        ("training", "1970-01-01 00:00 to 1970-01-01 01:30 UTC"),
        ("from first start to last step", "1 h 30 min"),
        ("starts again after the first", "1"),
        ("trainer ranks, at the end", "2"),
    ):
        assert "".join(f"<td>{cell}</td>" for cell in row) in text
    assert "learning rate and gradient norm over steps" in text
    assert f'bowstring.load_student("{finished_run.root}")' in unescape(text)


def test_a_picture_is_enlarged_without_a_script(page):
    assert page.count('<input type="checkbox"') == page.count("<img") > 0


def test_words_for_numbers():
    assert [duration(s) for s in (4, 200, 18360)] == ["4 s", "3 min 20 s", "5 h 06 min"]
    assert [size(b) for b in (12, 1500, 2.5e9)] == ["12 bytes", "1.5 kB", "2.5 GB"]


def test_repeated_steps_are_paid_for_twice():
    history = replay([Resume(0, 2, time=0.0), Resume(10, 4, time=3.0)])
    metrics = [
        Metrics(10, step_s=1.0, world_size=2, time=1.0),
        Metrics(20, step_s=1.0, world_size=2, time=2.0),
        Metrics(20, step_s=1.0, world_size=4, time=4.0),
    ]
    assert train_device_s(history, metrics) == 20 + 20 + 40
