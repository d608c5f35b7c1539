"""The report of a run: one page that opens anywhere, with everything inside it.

It reads files only (results.json, metrics.jsonl, events.jsonl, config.yaml, run.json,
samples/grid.npz), and says of each that is missing how to get it.
"""

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from distill.report import cost, figures
from distill.run import events, files, measured
from distill.run.identity import RunRecord, read_record


@dataclass(frozen=True)
class Facts:
    """What the files of a run hold; None or empty where one is missing."""

    name: str
    place: str  # the run's folder, as it was given
    results: measured.Results | None
    metrics: list[measured.Metrics]
    history: events.History
    grid: dict[str, np.ndarray] | None
    config: str
    record: RunRecord | None
    command: str


def read_facts(run: files.RunDir, command: str) -> Facts:
    """Reads what there is."""
    grid_path = run.samples / "grid.npz"
    grid = None
    if grid_path.exists():
        with np.load(grid_path, allow_pickle=False) as archive:
            grid = {key: archive[key] for key in archive.files}
    return Facts(
        name=run.root.resolve().name,
        place=str(run.root),
        results=measured.read_results(run),
        metrics=list(measured.read_metrics(run)),
        history=events.read_history(run),
        grid=grid,
        config=run.config.read_text() if run.config.exists() else "",
        record=read_record(run),
        command=command,
    )


# -----------------------------------------------------------------------------------------------
# What each section shows; nothing where its data is missing


def claim(facts: Facts) -> str:
    """What the student saves, in a few words for who reads no further; "" before an evaluation.

    Seconds are those of the same evaluation: the teacher's at its most evaluations, by its own
    solver, over the student's at its fewest.
    """
    results = facts.results
    if results is None or not results.student:
        return ""
    best = min(results.student, key=lambda row: row.nfe)
    fine = max(results.teacher, key=lambda row: (row.nfe, row.solver != "euler"), default=None)
    if fine is None or fine.nfe <= best.nfe or not best.seconds_per_1000:
        return ""
    times = fine.seconds_per_1000 / best.seconds_per_1000
    many = "evaluation" if best.nfe == 1 else "evaluations"
    faster = f": {times:.{0 if times >= 10 else 1}f} times faster" if times >= 1.5 else ""
    return f"{fine.nfe} network evaluations → {best.nfe} {many}{faster}, and this is how it looks."


def headline(facts: Facts) -> str:
    """One sentence: how near the student is to its teacher."""
    if facts.results is None or not facts.results.student:
        return "Not evaluated yet."
    best = min(facts.results.student, key=lambda row: row.nfe)
    euler = [row for row in facts.results.teacher if row.solver == "euler"]
    reached = [row.nfe for row in euler if row.distance_to_teacher <= best.distance_to_teacher]
    count = "One network evaluation" if best.nfe == 1 else f"{best.nfe} network evaluations"
    text = (
        f"{count} per image: the student ends {best.distance_to_teacher:.2%} away from the "
        "teacher's own end point (squared distance over the squared way travelled, on average)"
    )
    worst = max(facts.results.student, key=lambda row: row.distance_to_teacher)
    if worst.nfe > best.nfe:
        text += f"; with {worst.nfe} it is {worst.distance_to_teacher:.2%}, so not for more"
    if reached:
        return f"{text}. The teacher's Euler solver needs {min(reached)} for that."
    if euler:
        return f"{text}. The teacher's Euler solver is not there at {euler[-1].nfe}."
    return f"{text}."


def row_label(row: str) -> str:
    """A row name of grid.npz in words."""
    who, how, nfe = row.split(",")
    count = f"{nfe} evaluation" + ("" if nfe == "1" else "s")
    return f"Student, {count}" if who == "student" else f"Teacher, {how.capitalize()}, {count}"


def pictures(facts: Facts) -> list[dict[str, Any]]:
    """Picture rows: the same noise down every column."""
    if facts.grid is None:
        return []
    return [
        {
            "maker": row.split(",")[0],
            "label": row_label(row),
            "images": [figures.png_uri(image) for image in images],
        }
        for row, images in zip(facts.grid["rows"].tolist(), facts.grid["images"], strict=True)
    ]


def quality(facts: Facts) -> dict[str, Any] | None:
    """Curves and table of the evaluation."""
    results = facts.results
    if results is None:
        return None
    label, name = "distance to teacher", results.frechet_name
    rows = results.student + results.teacher
    has_features = any(row.frechet is not None for row in rows)
    keys = ["nfe", "distance_to_teacher", "seconds_per_1000"]
    return {
        "results": results,
        "distances": figures.quality_figure(results, "distance_to_teacher", label),
        "features": figures.quality_figure(results, "frechet", name) if has_features else None,
        "head": ["", "NFE", label, "s / 1,000"]
        + ([name, "kernel distance"] if has_features else []),
        "rows": [
            [row_name(row, results), *(number(getattr(row, key)) for key in keys)]
            + ([number(row.frechet), spread(row.kid, row.kid_std)] if has_features else [])
            for row in rows
        ],
        "marked": len(results.student),
    }


def row_name(row: measured.Row, results: measured.Results) -> str:
    """Who made the row: "student", "teacher, euler", "teacher, heun (reference)"."""
    if row.solver is None:
        return "student"
    is_truth = (row.solver, row.nfe) == (results.truth.solver, results.truth.nfe)
    return f"teacher, {row.solver}" + (" (reference)" if is_truth else "")


def last_of_each_step(metrics: list[measured.Metrics]) -> list[measured.Metrics]:
    """Records by step. Steps that a restart repeated keep the last, which the weights come from."""
    return [record for _, record in sorted({r.step: r for r in metrics}.items())]


def losses(facts: Facts) -> Figure | None:
    """Loss terms over steps."""
    metrics = last_of_each_step(facts.metrics)
    return figures.loss_figure(metrics) if metrics else None


def course(facts: Facts) -> Figure | None:
    """Learning rate and gradient norm over steps."""
    metrics = [record for record in last_of_each_step(facts.metrics) if record.lr is not None]
    return figures.course_figure(metrics) if metrics else None


def about(facts: Facts) -> list[list[str]]:
    """When and on what the student was trained."""
    starts, metrics = facts.history.starts, facts.metrics
    if not starts or not metrics:
        return []
    first, last = starts[0].time, max(record.time for record in metrics)
    days = [datetime.fromtimestamp(time, timezone.utc) for time in (first, last)]
    begun, ended = (f"{day:%Y-%m-%d %H:%M}" for day in days)
    rows = [
        ["training", f"{begun} to {ended} UTC"],
        ["from first start to last step", duration(last - first)],
        ["steps", number(max(record.step for record in metrics))],
        ["trainer ranks, at the end", number(metrics[-1].world_size)],
        ["starts again after the first", number(len(starts) - 1)],
        ["teacher workers lost", number(facts.history.lost)],
    ]
    return rows + ([["evaluated on", facts.results.device]] if facts.results else [])


def speed(facts: Facts) -> dict[str, Any] | None:
    """Throughput and data wait, and where the time of a step goes."""
    metrics = [record for record in facts.metrics if record.samples_per_s is not None]
    return {"figure": figures.speed_figure(metrics), "step": step_split(facts)} if metrics else None


def step_split(facts: Facts) -> list[list[str]]:
    """Where the time of a step goes; nothing for runs from before that was noted."""
    phases = cost.phase_seconds(facts.metrics)
    whole = sum(phases.values()) or 1.0
    rows = [[name, f"{number(1e3 * s)} ms", f"{s / whole:.1%}"] for name, s in phases.items()]
    last = facts.metrics[-1]
    if last.flops_per_s is not None:
        share = "" if last.mfu is None else f"{last.mfu:.1%} of the peak of the devices"
        rows.append(["work, last", f"{last.flops_per_s:.3g} FLOP/s", share])
    if last.peak_memory_bytes is not None:
        rows.append(["peak memory of a rank", size(last.peak_memory_bytes), ""])
    return rows


def teachers(facts: Facts) -> Figure | None:
    """Teacher workers and their speed."""
    if facts.record is None or not facts.history.changes:
        return None
    return figures.worker_figure(facts.history, facts.record.stream.samples_per_shard)


def identity(facts: Facts) -> dict[str, str] | None:
    """What run.json says of the run."""
    if facts.record is None:
        return None
    versions = facts.record.versions.items()
    return {
        "hash": facts.record.hash[:16],
        "versions": ", ".join(f"{name} {value}" for name, value in versions),
    }


# -----------------------------------------------------------------------------------------------
# Numbers in words


def number(value: float | int | None) -> str:
    """A number for a table: thousands separators, or three to four digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def spread(value: float | None, deviation: float | None) -> str:
    """A number with its standard deviation, to as many digits: "-0.0008 ± 0.0020"."""
    if value is None or not deviation:
        return number(value)
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{value:.{digits}f} ± {deviation:.{digits}f}"


def duration(seconds: float | int) -> str:
    """Seconds in words: "12 s", "3 min 20 s", "5 h 06 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float | int) -> str:
    """Bytes in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.3g} {unit}"


# -----------------------------------------------------------------------------------------------
# The page


def environment() -> jinja2.Environment:
    """The templates of this room, which escape what they are given."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "number": number,
        "duration": duration,
        "size": size,
        "svg": figures.inline_svg,
    }
    return made


def render(facts: Facts) -> str:
    """The page: templates/page.html, which has its words."""
    return (
        environment()
        .get_template("page.html")
        .render(
            name=facts.name,
            place=facts.place,
            objective=facts.results.objective if facts.results else "",
            claim=claim(facts),
            headline=headline(facts),
            pictures=pictures(facts),
            quality=quality(facts),
            losses=losses(facts),
            course=course(facts),
            about=about(facts),
            speed=speed(facts),
            teachers=teachers(facts),
            cost=facts.results.cost if facts.results else None,
            identity=identity(facts),
            config=facts.config,
            command=facts.command,
        )
    )


def write_report(run: files.RunDir, command: str) -> Path:
    """Path of report.html, written atomically; also samples/overview.png when there are
    pictures."""
    facts = read_facts(run, command)
    page = render(facts)
    if facts.grid is not None:
        rows = zip(facts.grid["rows"].tolist(), facts.grid["images"], strict=True)
        chosen = [(row_label(row), images) for row, images in rows if ",euler," not in row]
        figures.write_overview(run.samples / "overview.png", chosen)
    files.write_atomic(run.report, page.encode())
    return run.report
