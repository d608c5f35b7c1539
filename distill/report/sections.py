"""The report of a run: one page that opens anywhere, with everything inside it.

It reads files only (results.json, metrics.jsonl, events.jsonl, config.yaml, run.json,
samples/grid.npz), and says of each that is missing how to get it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.report.cost import phase_seconds
from distill.report.figures import (
    inline_svg,
    loss_figure,
    png_uri,
    quality_figure,
    speed_figure,
    worker_figure,
    write_overview,
)
from distill.report.page import STYLE, duration, missing, number, size, table
from distill.run.dir import RunDir
from distill.run.events import WorkerHistory, worker_history
from distill.run.files import read_lines, write_atomic


@dataclass(frozen=True)
class Facts:
    """What the files of a run hold; None or empty where one is missing."""

    name: str
    results: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    workers: WorkerHistory
    grid: dict[str, np.ndarray] | None
    config: str
    identity: dict[str, Any] | None
    command: str


def read_facts(run: RunDir, command: str) -> Facts:
    """Reads what there is."""
    grid_path = run.samples / "grid.npz"
    grid = None
    if grid_path.exists():
        with np.load(grid_path, allow_pickle=False) as archive:
            grid = {key: archive[key] for key in archive.files}
    return Facts(
        name=run.root.resolve().name,
        results=json.loads(run.results.read_text()) if run.results.exists() else None,
        metrics=[record for record in read_lines(run.metrics) if "step" in record],
        workers=worker_history(read_lines(run.events)),
        grid=grid,
        config=run.config.read_text() if run.config.exists() else "",
        identity=json.loads(run.identity.read_text()) if run.identity.exists() else None,
        command=command,
    )


# -----------------------------------------------------------------------------------------------
# Sections


def headline(facts: Facts) -> str:
    """One sentence: what the student saves."""
    if facts.results is None or not facts.results["student"]:
        return "Not evaluated yet."
    best = min(facts.results["student"], key=lambda row: row["nfe"])
    euler = [row for row in facts.results["teacher"] if row["solver"] == "euler"]
    reached = [r["nfe"] for r in euler if r["distance_to_teacher"] <= best["distance_to_teacher"]]
    count = "One network evaluation" if best["nfe"] == 1 else f"{best['nfe']} network evaluations"
    text = (
        f"{count} per image: the student ends {best['distance_to_teacher']:.2%} away from the "
        "teacher's own end point (squared distance over the squared way travelled, on average)"
    )
    worst = max(facts.results["student"], key=lambda row: row["distance_to_teacher"])
    if worst["nfe"] > best["nfe"]:
        text += f"; with {worst['nfe']} it is {worst['distance_to_teacher']:.2%}, so not for more"
    if reached:
        return f"{text}. The teacher's Euler solver needs {min(reached)} for that."
    if euler:
        return f"{text}. The teacher's Euler solver is not there at {euler[-1]['nfe']}."
    return f"{text}."


def row_label(row: str) -> str:
    """A row name of grid.npz in words."""
    who, how, nfe = row.split(",")
    count = f"{nfe} evaluation" + ("" if nfe == "1" else "s")
    return f"Student, {count}" if who == "student" else f"Teacher, {how.capitalize()}, {count}"


def pictures(facts: Facts) -> str:
    """Picture rows: the same noise down every column."""
    if facts.grid is None:
        return missing(
            "There are no pictures.", "bowstring evaluate draws them, unless the run is in latents."
        )
    parts, previous = [], None
    for row, images in zip(facts.grid["rows"].tolist(), facts.grid["images"], strict=True):
        who = row.split(",")[0]
        if previous not in (None, who):
            parts.append('<div class="gap"></div>')
        previous = who
        label = html.escape(row_label(row))
        cells = "".join(f'<img alt="" src="{png_uri(image)}">' for image in images)
        parts.append(f'<span>{label}</span><div role="img" aria-label="{label}">{cells}</div>')
    caption = (
        "Every column starts from the same noise and the same label. The first row is what the "
        "student should reproduce; the last rows are the teacher stopped as early as the student."
    )
    return (
        f'<figure><div class="strips">{"".join(parts)}</div><figcaption>{caption}</figcaption>'
        "</figure>"
    )


def quality(facts: Facts) -> str:
    """Curves and table of the evaluation."""
    results = facts.results
    if results is None:
        return missing("There is no results.json yet.", "It comes with: bowstring evaluate.")
    label = "distance to teacher"
    parts = [
        "<p>Squared distance between an image and the end of the teacher's own trajectory from the "
        "same noise, relative to the squared length of the way from noise to image. "
        f"{results['n']:,} samples of seed {results['seed']}, which no training saw. "
        "The lower the better.</p>",
        f"<figure>{quality_figure(results, 'distance_to_teacher', label)}</figure>",
    ]
    name = results["frechet_name"]
    rows = results["student"] + results["teacher"]
    has_features = any("frechet" in row for row in rows)
    if has_features:
        reference = results["reference"]
        parts.append(
            f"<p>{html.escape(name)} to {reference['n']:,} real images "
            f"({html.escape(reference['name'])}), features "
            f"{html.escape(results['extractor']['name'])}, sha256 "
            f"<code>{results['extractor']['sha256'][:16]}</code>. The "
            "teacher's own solver at many evaluations shows what its student can reach.</p>"
        )
        parts.append(f"<figure>{quality_figure(results, 'frechet', name)}</figure>")
    head = ["", "NFE", label, *([name, "kernel distance"] if has_features else []), "s / 1,000"]
    keys = ["distance_to_teacher", *(["frechet", "kid"] if has_features else [])]
    lines = [
        [row_name(row, results)]
        + [number(row.get(key)) for key in ("nfe", *keys, "seconds_per_1000")]
        for row in rows
    ]
    parts.append(table(head, lines, marked=set(range(len(results["student"])))))
    if results["truth"]["guidance"] != 1:
        parts.append(
            f'<p class="soft">The teacher is sampled with guidance '
            f"{results['truth']['guidance']:g}: each of its evaluations runs its network "
            "twice, the student's once.</p>"
        )
    return "".join(parts)


def row_name(row: dict[str, Any], results: dict[str, Any]) -> str:
    """Who made the row: "student", "teacher, euler", "teacher, heun (reference)"."""
    if "solver" not in row:
        return "student"
    is_truth = (row["solver"], row["nfe"]) == (results["truth"]["solver"], results["truth"]["nfe"])
    return f"teacher, {row['solver']}" + (" (reference)" if is_truth else "")


def last_of_each_step(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records by step. Steps that a restart repeated keep the last, which the weights come from."""
    return [record for _, record in sorted({r["step"]: r for r in metrics}.items())]


def losses(facts: Facts) -> str:
    """Loss terms over steps."""
    metrics = last_of_each_step(facts.metrics)
    if not metrics:
        return missing("No training step has been logged yet.", "They come with: bowstring train.")
    caption = "Terms before their weights. The total is weighted."
    return f"<figure>{loss_figure(metrics)}<figcaption>{caption}</figcaption></figure>"


def speed(facts: Facts) -> str:
    """Throughput and data wait."""
    metrics = [record for record in facts.metrics if "samples_per_s" in record]
    if not metrics:
        return missing("No speed has been logged yet.", "It comes with: bowstring train.")
    caption = "Waiting means that the trainer was ready and the next shards were not there."
    figure = f"<figure>{speed_figure(metrics)}<figcaption>{caption}</figcaption></figure>"
    return figure + step_split(facts)


def step_split(facts: Facts) -> str:
    """Where the time of a step goes; nothing for runs from before that was noted."""
    phases = phase_seconds(facts.metrics)
    whole = sum(phases.values()) or 1.0
    rows = [[name, f"{number(1e3 * s)} ms", f"{s / whole:.1%}"] for name, s in phases.items()]
    last = facts.metrics[-1]
    if "flops_per_s" in last:
        share = f"{last['mfu']:.1%} of the peak of the devices" if "mfu" in last else ""
        rows.append(["work, last", f"{last['flops_per_s']:.3g} FLOP/s", share])
    if "peak_memory_bytes" in last:
        rows.append(["peak memory of a rank", size(last["peak_memory_bytes"]), ""])
    return table(["of a mean step", "", "share"], rows) if rows else ""


def teachers(facts: Facts) -> str:
    """Teacher workers and their speed."""
    if facts.identity is None or not facts.workers.changes:
        return missing("No teacher worker was asked for yet.", "They come with: bowstring run.")
    count = facts.identity["stream"]["samples_per_shard"]
    title = "teacher workers and pairs per second over time"
    figure = inline_svg(worker_figure(facts.workers, count), title)
    caption = (
        "A shard counts evenly over the time from its lease to its commit. Workers that are wanted "
        "and not at work still load their teachers. Where the trainer holds them back, or all is "
        "made, the speed falls and the workers stay."
    )
    return f"<figure>{figure}<figcaption>{caption}</figcaption></figure>"


def cost(facts: Facts) -> str:
    """The cost ledger."""
    if facts.results is None:
        return missing("There is no cost ledger yet.", "It comes with: bowstring evaluate.")
    ledger = facts.results["cost"]
    rows = [
        ["teacher sampling, device time", duration(ledger["teacher_device_s"])],
        ["student training, device time", duration(ledger["train_device_s"])],
        ["teacher evaluations", f"{ledger['teacher_nfe']:,}"],
        ["trajectories on disk", size(ledger["bytes"])],
    ]
    return table(["item", "spent"], rows)


def configuration(facts: Facts) -> str:
    """The composed configuration and the identity of the run."""
    parts = []
    if facts.identity is not None:
        versions = facts.identity.get("versions", {})
        words = html.escape(", ".join(f"{name} {value}" for name, value in versions.items()))
        digest = html.escape(str(facts.identity.get("hash", "-"))[:16])
        parts.append(f'<p class="soft">Identity <code>{digest}</code>. {words}</p>')
    if not facts.config:
        return "".join(parts) + missing("There is no config.yaml.", "bowstring run writes it.")
    return (
        f"{''.join(parts)}<details><summary>config.yaml</summary>"
        f"<pre>{html.escape(facts.config)}</pre></details>"
    )


def command_line(facts: Facts) -> str:
    """The command that made the run."""
    if not facts.command:
        return missing("The command is not known.", "bowstring run records it.")
    return f"<pre>{html.escape(facts.command)}</pre>"


SECTIONS: tuple[tuple[str, str, Callable[[Facts], str]], ...] = (
    ("pictures", "Pictures", pictures),
    ("quality", "Quality against evaluations", quality),
    ("loss", "Loss", losses),
    ("speed", "Throughput", speed),
    ("teachers", "Teacher workers", teachers),
    ("cost", "Cost", cost),
    ("configuration", "Configuration", configuration),
    ("command", "Command", command_line),
)


def write_report(run: RunDir, command: str) -> Path:
    """Path of report.html, written atomically; also samples/overview.png when there are
    pictures."""
    facts = read_facts(run, command)
    objective = f" · {facts.results['objective']}" if facts.results else ""
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{make(facts)}</section>'
        for key, title, make in SECTIONS
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(facts.name)} · Bowstring</title><style>{STYLE}</style></head><body>"
        f'<p class="soft">Bowstring{html.escape(objective)}</p><h1>{html.escape(facts.name)}</h1>'
        f'<p class="lead">{html.escape(headline(facts))}</p>{body}</body></html>\n'
    )
    if facts.grid is not None:
        rows = zip(facts.grid["rows"].tolist(), facts.grid["images"], strict=True)
        chosen = [(row_label(row), images) for row, images in rows if ",euler," not in row]
        write_overview(run.samples / "overview.png", chosen)
    write_atomic(run.report, page.encode())
    return run.report
