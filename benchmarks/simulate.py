"""What preemption of 1,000 teachers does to the trainer: the real coordinator in simulated time.

    python benchmarks/simulate.py            about 5 minutes of one core
    python benchmarks/simulate.py --quick    one seed, three rates, about a minute; writes nothing

`benchmarks.stream.world` says what is real and what is simulated. Four tables: goodput against the
rate at which nodes are taken, in three ways and with two surpluses of teachers; goodput against
`trajectory.ready_ahead`, the window within which teachers may work; sick GPUs; and the whole run of
`experiment=imagenet256_sit` with the times that `bowstring estimate` gives it. The same seeds give
the same numbers. Writes docs/benchmarks/simulate.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.stream.world import World
from benchmarks.stream.world_settings import SICKNESSES, WAYS, Settings
from cluster.plan.estimate import estimate
from cluster.plan.stream import stream_plan
from cluster.settings.hydra import compose

PER_HOUR = (0.01, 0.05, 0.10, 0.20, 0.50)
HEADROOM = (1.0, 1.1)
READY_AHEAD = (500, 1000, 2000, 4000, 8000, 16_000)
SEEDS = (0, 1, 2)
TABLES = ("rates", "windows", "sick", "imagenet256")
USUAL = Settings()


def rates(headroom: float, per_hour: tuple[float, ...]) -> list[Settings]:
    """No preemption, then every way at every rate."""
    base = replace(USUAL, headroom=headroom)
    return [base] + [replace(base, way=way, per_hour=rate) for way in WAYS for rate in per_hour]


def windows() -> list[Settings]:
    """10 % of the nodes an hour, killed, within windows of several sizes."""
    base = replace(USUAL, headroom=1.1, way="killed", per_hour=0.10)
    return [replace(base, ready_ahead=ready_ahead) for ready_ahead in READY_AHEAD]


def sick() -> dict[str, Settings]:
    """256 GPUs, three of them sick in each way; and 1,000 spot nodes, 1 % of them sick."""
    base = replace(
        USUAL, teachers=256, headroom=1.1, ready_ahead=2048, shards=18_432, first=2048, last=14_336
    )
    found = {"-": base}
    found |= {name: replace(base, sick=(name,)) for name in SICKNESSES}
    found["all of these"] = replace(base, sick=SICKNESSES)
    found["1,000 spot nodes, ten sick"] = replace(
        USUAL,
        per_node=1,
        headroom=2.0,
        way="killed",
        per_hour=2.0,
        sick=("load", "first", "nan", "dies", "slow"),
        each_sick=2,
    )
    return found


def imagenet256() -> list[Settings]:
    """All shards of that experiment, at the estimate's speeds, with and without preemption."""
    (config,) = compose(["experiment=imagenet256_sit"])
    hours, plan = estimate(config)["assumed"]["hours"], stream_plan(config)
    teachers = config.cluster.teachers.num_workers
    whole = Settings(
        teachers=teachers,
        lease_timeout_s=config.cluster.teachers.lease_timeout_s,
        headroom=hours["train"] / hours["generate"],
        shard_s=3600 * hours["generate"] * teachers / plan.shards,
        ready_ahead=config.trajectory.ready_ahead,
        block_shards=config.trajectory.block_shards,
        block_spread=config.trajectory.spread,
        shards=plan.shards,
        first=0,
        last=plan.shards,
    )
    return [whole] + [replace(whole, way=way, per_hour=0.10) for way in WAYS]


def measure(settings: Settings, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Settings, and every number of the summary by seed."""
    found = [World(replace(settings, seed=seed)).run() for seed in seeds]
    print(f"{settings.headroom} {settings.way} {settings.per_hour} {settings.ready_ahead}", end=" ")
    print(f"goodput {mean(values['goodput'] for values in found):.3f}", flush=True)
    numbers = {name: [round(values[name], 6) for values in found] for name in found[0]}
    return {"settings": asdict(settings), **numbers}


# -----------------------------------------------------------------------------------------------
# Report


def spread(values: list[float], form: str) -> str:
    """Mean, and least and greatest over the seeds where they differ."""
    texts = [form.format(value) for value in (mean(values), min(values), max(values))]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]} .. {texts[2]})"


def line(first: list[str], row: dict[str, Any]) -> str:
    """A row of a table: what was set, then what came out."""
    cells = [
        *first,
        spread(row["goodput"], "{:.3f}"),
        f"{mean(row['teachers_up']):.3f}",
        f"{mean(row['backlog']):,.0f}",
        f"{max(row['longest_wait_s']):,.0f}",
        f"{mean(row['wasted']):.2%}",
        f"{mean(row['taken_per_hour']):.0f}",
        f"{mean(row['expiries_per_hour']):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADING = """# Preemption of teachers, simulated

`python benchmarks/simulate.py`; `benchmarks/stream/world.py` says what is real and what is
simulated. Where seeds differ, least and greatest stand behind the mean; in the figure they are the
bars. `drained`: notice of 120 s, no other shard is taken. `killed`: known after 14 s. `silent`:
known when the lease runs out, after 120 s.

![Goodput and waste by rate of preemption, goodput by window](simulate.png)
"""
NUMBERS = (
    "goodput | teachers up | backlog, shards | longest wait, s | evaluations wasted | "
    "workers taken / h | leases expired / h |"
)


def page(found: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = ["## 1,000 teachers in nodes of 8", ""]
    lines += [f"| teachers / need | how | nodes taken / h | {NUMBERS}", "|---" * 10 + "|"]
    for row in found["rates"]:
        chosen = row["settings"]
        how = chosen["way"] if chosen["per_hour"] else "-"
        lines.append(line([f"{chosen['headroom']:.1f}", how, f"{chosen['per_hour']:.0%}"], row))
    lines += ["", "## The window: 10 % of the nodes killed an hour, teachers / need 1.1", ""]
    lines += [f"| ready_ahead | per teacher | {NUMBERS}", "|---" * 9 + "|"]
    for row in found["windows"]:
        ready_ahead = row["settings"]["ready_ahead"]
        per_teacher = f"{ready_ahead / row['settings']['teachers']:g}"
        lines.append(line([f"{ready_ahead:,}", per_teacher], row))
    lines += ["", "## Sick GPUs: three of 256 in each way, for ever; teachers / need 1.1", ""]
    lines += [f"| sick | excluded | {NUMBERS}", "|---" * 9 + "|"]
    lines += [line([row["name"], spread(row["excluded"], "{:.0f}")], row) for row in found["sick"]]
    chosen = found["imagenet256"][0]["settings"]
    given = f"{chosen['teachers']} teachers, teachers / need {chosen['headroom']:.3f}"
    lines += ["", f"## `experiment=imagenet256_sit`, {given}", ""]
    lines += [f"| how | nodes taken / h | hours | {NUMBERS}", "|---" * 10 + "|"]
    for row in found["imagenet256"]:
        chosen = row["settings"]
        how = chosen["way"] if chosen["per_hour"] else "-"
        lines.append(line([how, f"{chosen['per_hour']:.0%}", spread(row["hours"], "{:.1f}")], row))
    return "\n".join(lines) + "\n"


def as_json(found: dict[str, Any]) -> str:
    """What was found as JSON, a row of a table on a line."""
    parts = []
    for name, value in found.items():
        text = json.dumps(value)
        if name in TABLES:
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def goodput_line(
    axes: Axes, x: list[float], rows: list[dict[str, Any]], color: str, **style: Any
) -> None:
    """Goodput of `rows` against x: means over the seeds, with the least and the greatest."""
    values = [row["goodput"] for row in rows]
    y = [mean(each) for each in values]
    below = [mean(each) - min(each) for each in values]
    above = [max(each) - mean(each) for each in values]
    axes.errorbar(x, y, (below, above), color=color, marker="o", ms=3, lw=1.2, capsize=2, **style)


def plot(found: dict[str, Any]) -> Figure:
    """Goodput and waste by rate, and goodput by window. Bars reach over the seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    goodput, waste, window = figure.subplots(1, 3)
    for headroom, style in zip(HEADROOM, ("--", "-"), strict=True):
        for way, color in zip(WAYS, ("#0072b2", "#d55e00", "#009e73"), strict=True):
            rows = [
                row
                for row in found["rates"]
                if row["settings"]["headroom"] == headroom
                and (row["settings"]["way"] == way or row["settings"]["per_hour"] == 0)
            ]
            x = [100 * row["settings"]["per_hour"] for row in rows]
            label = f"{way}, teachers / need {headroom:g}"
            goodput_line(goodput, x, rows, color, ls=style, label=label)
            if headroom == HEADROOM[-1]:
                y = [100 * mean(row["wasted"]) for row in rows]
                waste.plot(x, y, style, color=color, marker="o", ms=3)
    goodput.set(xlabel="% of nodes taken per hour", ylabel="goodput of the trainer")
    waste.set(xlabel="% of nodes taken per hour", ylabel="% of teacher evaluations wasted")
    rows = found["windows"]
    x = [row["settings"]["ready_ahead"] / row["settings"]["teachers"] for row in rows]
    goodput_line(window, x, rows, "#0072b2")
    window.set(xlabel="ready_ahead / teachers", ylabel="goodput of the trainer", xscale="log")
    window.set_xticks(x, [f"{value:g}" for value in x])
    window.minorticks_off()
    goodput.legend(fontsize=7, frameon=False)
    for axes in (goodput, waste, window):
        axes.grid(alpha=0.2)
        axes.set_ylim(bottom=0 if axes is not goodput else None)
    return figure


def main() -> None:
    """Runs all worlds, prints, and writes the page unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, three rates")
    quick = parser.parse_args().quick
    seeds, per_hour = (SEEDS[:1], (0.10, 0.50)) if quick else (SEEDS, PER_HOUR)
    started = time.process_time()
    found: dict[str, Any] = {
        "command": "python benchmarks/simulate.py",
        "seeds": seeds,
        "rates": [measure(s, seeds) for headroom in HEADROOM for s in rates(headroom, per_hour)],
        "windows": [measure(settings, seeds) for settings in windows()],
        "sick": [measure(settings, seeds) | {"name": name} for name, settings in sick().items()],
        "imagenet256": [measure(settings, seeds) for settings in imagenet256()],
    }
    found["cpu_s"] = round(time.process_time() - started, 1)
    text = page(found)
    print(f"\n{text}\n{found['cpu_s']} s of CPU")
    if quick:
        return
    out = ROOT / "docs" / "benchmarks"
    (out / "simulate.json").write_text(as_json(found))
    plot(found).savefig(out / "simulate.png", dpi=110)
    (out / "simulate.md").write_text(f"{HEADING}\n{text}")
    print(out / "simulate.json", out / "simulate.md", out / "simulate.png", sep="\n")


if __name__ == "__main__":
    main()
