"""Tables and the plot of `benchmarks/objectives.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

NFE = ("1", "2", "3", "4", "8", "16")
FEW = ("1", "2", "4")  # of the second measures, and of guides


def tables(found: dict[str, Any]) -> str:
    """Markdown: objectives by problem and normalisation, the teacher's curves, guides."""
    parts = [heading(found)]
    problems = list(found["teachers"])
    for table in ("equal steps", "equal compute"):
        for problem in problems:
            rows = select(found, table, problem)
            if rows:
                parts += [f"### {problem}, {table}", objective_table(rows), ""]
    for problem in problems:
        parts += [f"### {problem}, the teacher's own solvers", teacher_table(found, problem), ""]
    guides = [row for row in found["rows"] if row["table"] == "guides"]
    for problem in dict.fromkeys(row["problem"].split("/")[0] for row in guides):
        chosen = [row for row in guides if row["problem"].startswith(problem + "/")]
        parts += [f"### {problem}, Bezier with several teachers", guide_table(chosen), ""]
    return "\n".join(parts)


def select(found: dict[str, Any], table: str, problem: str) -> list[dict[str, Any]]:
    """Rows of one table and problem."""
    return [r for r in found["rows"] if r["table"] == table and r["problem"] == problem]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds where there are several: "0.0123 ± 0.0004"."""
    centre = mean(values)
    return f"{centre:.5f} ± {stdev(values):.5f}" if len(values) > 1 else f"{centre:.5f}"


def grouped(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows by the values of `keys`, in order of first appearance."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def objective_table(rows: list[dict[str, Any]]) -> str:
    """One line per objective: distance to the teacher, energy distance, and in the plane the share
    off the data; means, of the distance with deviation.
    """
    others = ["energy", "off_data"] if rows[0]["off_data"] else ["energy"]
    named = {"energy": "energy", "off_data": "off data"}
    heads = [*(f"@{n}" for n in NFE), *(f"{named[k]} @{n}" for k in others for n in FEW), "s"]
    lines = [
        "| objective | steps | forwards | " + " | ".join(heads) + " |",
        "|---|---|---|" + "---|" * len(heads),
    ]
    for (name,), group in grouped(rows, "row").items():
        distances = [spread([row["distance"][n] for row in group]) for n in NFE]
        more = [f"{mean(row[kind][n] for row in group):.4f}" for kind in others for n in FEW]
        seconds = f"{mean(row['seconds'] for row in group):.0f}"
        cells = [name, str(group[0]["steps"]), f"{group[0]['forwards']:.0f}", *distances, *more]
        lines.append("| " + " | ".join([*cells, seconds]) + " |")
    return "\n".join(lines)


def teacher_table(found: dict[str, Any], problem: str) -> str:
    """Distance and energy distance of Euler and Heun by NFE."""
    lines = ["| solver | NFE | distance | energy |", "|---|---|---|---|"]
    for row in found["teachers"][problem]:
        lines.append(
            f"| {row['solver']} | {row['nfe']} | {row['distance']:.5f} | {row['energy']:.4f} |"
        )
    return "\n".join(lines)


def guide_table(rows: list[dict[str, Any]]) -> str:
    """One line per set of teachers and variant."""
    lines = ["| teachers | curve | @1 | @2 | @4 |", "|---|---|---|---|---|"]
    for (problem, name), group in grouped(rows, "problem", "row").items():
        distances = [spread([row["distance"][n] for row in group]) for n in FEW]
        cells = [problem.split("/")[1], name, *distances]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any]) -> Figure:
    """Distance to the teacher by NFE, and the teacher's Euler; a panel a problem. At equal steps,
    or at equal compute where that was not trained.
    """
    problems = list(found["teachers"])
    figure = Figure(figsize=(4.2 * len(problems), 4), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        rows = select(found, "equal steps", problem) or select(found, "equal compute", problem)
        for (name,), group in grouped(rows, "row").items():
            centre = [mean(row["distance"][n] for row in group) for n in NFE]
            low = [min(row["distance"][n] for row in group) for n in NFE]
            high = [max(row["distance"][n] for row in group) for n in NFE]
            x = [int(n) for n in NFE]
            (line,) = axes.plot(x, centre, marker="o", ms=3, lw=2.2 if name == "traflow" else 1.2)
            line.set_label(name)
            axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), lw=0)
            line.set_linestyle("-" if len(axes.lines) <= 10 else ":")
        euler = [row for row in found["teachers"][problem] if row["solver"] == "euler"]
        axes.plot(
            [row["nfe"] for row in euler],
            [row["distance"] for row in euler],
            color="0.4",
            ls="--",
            label="teacher, Euler",
        )
        axes.set(xscale="log", yscale="log", title=problem, xlabel="network evaluations")
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("distance to the teacher")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def write(folder: Path, page: Path, name: str, found: dict[str, Any], text: str) -> None:
    """NAME.json and NAME.png in `folder`; the tables between the two marks of NAME in `page`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found).savefig(folder / f"{name}.png", dpi=110)
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def heading(found: dict[str, Any]) -> str:
    """When, where and how long."""
    seeds = ", ".join(map(str, sorted({row["seed"] for row in found["rows"]})))
    return (
        f"{found['date']}; {found['machine']}; `{found['command']}`, {found['minutes']} minutes, "
        f"{found['cached']} of {len(found['rows'])} rows trained in an earlier run. "
        "Distance to the teacher and energy distance to samples of the data, mean ± standard "
        f"deviation over seeds {seeds}; s is seconds of training.\n"
    )
