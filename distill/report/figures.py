"""Figures of the report: curves as inline SVG in the colours of the page, pictures as PNG."""

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distill.report.pictures import tile
from distill.run import events, files, measured

# Drawn in this colour, then replaced by the page's own text colour, so that dark pages work too.
INK = "#010203"
# Readable on white and on near-black, and told apart by people who see few colours (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
WORKER_BINS = 100  # over the whole time
STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def inline_svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element: no links, no fixed ink colour, `title` for screen readers."""
    buffer = io.StringIO()
    # The salt keeps the ids of several figures on one page apart, and the file the same every time.
    # Text stays text and takes the font of the page.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return text.replace(INK, "currentColor")


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty figure in the style of the report."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True)
    return figure, axes


def quality_figure(results: measured.Results, key: str, label: str) -> Figure:
    """`key` against NFE: the student, and the teacher's solvers. Logarithmic where values spread.

    A distance of exactly 0, of the reference solution to itself, has no place on such an axis.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes("network evaluations per image (NFE)", label)
        curves = {"student": [row for row in results.student if getattr(row, key) is not None]}
        for row in results.teacher:
            if getattr(row, key):
                curves.setdefault(f"teacher, {row.solver}", []).append(row)
        for color, (name, rows) in zip(COLORS, curves.items(), strict=False):
            style = "-" if name == "student" else "--"
            x, y = [row.nfe for row in rows], [getattr(row, key) for row in rows]
            axes.plot(x, y, style, marker="o", color=color, label=name, linewidth=2)
        axes.set_xscale("log", base=2)
        values = [getattr(row, key) for rows in curves.values() for row in rows]
        if values and min(values) > 0 and max(values) > 4 * min(values):
            axes.set_yscale("log")
        ticks = sorted({row.nfe for rows in curves.values() for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.legend(frameon=False)
        return figure


def _values(metrics: list[measured.Metrics], name: str) -> list[float]:
    """A number of every line, NaN where it was not noted."""
    return [np.nan if (value := getattr(r, name)) is None else value for r in metrics]


def loss_figure(metrics: list[measured.Metrics]) -> Figure:
    """Total loss and every term over steps, on a logarithmic axis."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes("step", "loss")
        steps = [record.step for record in metrics]
        names = list(dict.fromkeys(name for record in metrics for name in record.terms))
        axes.plot(steps, _values(metrics, "loss"), color=INK, label="total", linewidth=2)
        for index, name in enumerate(names):
            values = [record.terms.get(name, np.nan) for record in metrics]
            color = COLORS[index % len(COLORS)]
            axes.plot(steps, values, color=color, label=name, linewidth=1.3)
        axes.set_yscale("log")
        axes.legend(frameon=False, ncols=3)
        return figure


def course_figure(metrics: list[measured.Metrics]) -> Figure:
    """Learning rate and gradient norm over steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        steps = [record.step for record in metrics]
        top.plot(steps, _values(metrics, "lr"), color=COLORS[0], linewidth=2)
        top.set_ylabel("learning rate")
        top.set_ylim(bottom=0)
        bottom.plot(steps, _values(metrics, "grad_norm"), color=COLORS[1], linewidth=1.3)
        bottom.set_ylabel("gradient norm")
        bottom.set_yscale("log")
        bottom.set_xlabel("step")
        for axes in (top, bottom):
            axes.grid(True)
        return figure


def speed_figure(metrics: list[measured.Metrics]) -> Figure:
    """Training throughput, and the share of time spent waiting for data, over wall time."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        minutes = [(record.time - metrics[0].time) / 60 for record in metrics]
        top.plot(minutes, _values(metrics, "samples_per_s"), color=COLORS[0], linewidth=2)
        top.set_ylabel("samples / s")
        top.set_ylim(bottom=0)
        waits = [100 * share for share in _values(metrics, "data_wait_fraction")]
        bottom.plot(minutes, waits, color=COLORS[1], linewidth=2)
        bottom.set_ylabel("waiting for data, %")
        bottom.set_ylim(0, 100)
        bottom.set_xlabel("minutes since the first logged step")
        for axes in (top, bottom):
            axes.grid(True)
        return figure


def worker_figure(history: events.History, samples_per_shard: int) -> Figure:
    """Teacher workers wanted and at work, and the pairs they make per second, over wall time."""
    first = history.changes[0][0]
    last = max([history.changes[-1][0], *(end for _, end in history.spans)])
    unit, name = (1, "seconds") if last - first < 300 else (60, "minutes")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        times, wanted, at_work = zip(
            *history.changes, (last, *history.changes[-1][1:]), strict=True
        )
        x = [(time - first) / unit for time in times]
        top.step(x, wanted, "--", where="post", color=INK, label="wanted", linewidth=1.3)
        top.step(x, at_work, where="post", color=COLORS[0], label="at work", linewidth=2)
        top.set_ylabel("teacher workers")
        top.set_ylim(0, max(*wanted, *at_work) + 0.5)
        top.yaxis.set_major_locator(MaxNLocator(integer=True))
        top.legend(frameon=False)
        edges = np.linspace(first, max(last, first + 1), WORKER_BINS + 1)
        pairs = samples_per_shard * np.diff(history.shards_made(edges)) / np.diff(edges)
        bottom.stairs(pairs, (edges - first) / unit, color=COLORS[1], linewidth=2)
        bottom.set_ylabel("pairs / s")
        bottom.set_ylim(bottom=0)
        bottom.set_xlabel(f"{name} since the first worker was asked for")
        for axes in (top, bottom):
            axes.grid(True)
        return figure


# -----------------------------------------------------------------------------------------------
# Pictures


def png_uri(image: np.ndarray) -> str:
    """A data: URI of one uint8 picture [C, H, W]; a small one is enlarged without smoothing."""
    buffer = io.BytesIO()
    tile(image[None], columns=1).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_overview(path: Path, rows: list[tuple[str, np.ndarray]]) -> None:
    """Writes the README's picture: one labelled row of pictures [N, C, H, W] per entry."""
    columns, cell, margin = len(rows[0][1]), 0.62, 2.3  # inches
    width, height = margin + cell * columns, cell * len(rows)
    figure = Figure(figsize=(width, height), dpi=150)
    for index, (label, images) in enumerate(rows):
        bottom = height - (index + 1) * cell
        figure.text(
            (margin - 0.12) / width, (bottom + cell / 2) / height, label, ha="right", va="center"
        )
        for column, image in enumerate(images):
            left = margin + column * cell
            box = (left / width, bottom / height, 0.94 * cell / width, 0.94 * cell / height)
            axes = figure.add_axes(box)
            axes.imshow(np.asarray(tile(image[None], columns=1)), cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    files.write_atomic(path, buffer.getvalue())
