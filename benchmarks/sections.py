"""A benchmark of several sections: which to measure, their records, their page.

Whole sections go to docs/benchmarks/NAME.{json,md} with date, machine and the load before them; the
sections that were not asked for stay as they were. --quick writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


class Section(NamedTuple):
    """A module with two functions.

    measure(quick, folder): what it finds, ready for JSON, in a folder of its own.
    page(found): Markdown of that.
    """

    title: str
    module: ModuleType

    def record(self, quick: bool) -> dict[str, Any]:
        """What it finds, with when and where."""
        load, began = os.getloadavg()[0], time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bowstring-") as folder:
            found = self.module.measure(quick, Path(folder))
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU used",
            "torch": torch.__version__,
            "load_before": round(load, 2),
            "minutes": round((time.monotonic() - began) / 60, 1),
            **found,
        }

    def text(self, found: dict[str, Any]) -> str:
        """A section in Markdown."""
        return (
            f"## {self.title}\n\n{self.module.page(found)}\n\n{found['date']}; {found['machine']}; "
            f"torch {found['torch']}; load before {found['load_before']}, {found['minutes']} "
            "minutes.\n"
        )


def main(name: str, title: str, about: str, sections: dict[str, Section]) -> None:
    """Measures, prints, and writes the pages unless --quick."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(sections), help=", ".join(sections))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    unknown = set(options.sections) - set(sections)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    store = OUT / f"{name}.json"
    found = json.loads(store.read_text()) if store.exists() else {}
    for key in options.sections:
        found[key] = sections[key].record(options.quick)
        print(sections[key].text(found[key]), flush=True)
        if options.quick:
            print(json.dumps(found[key]))
            continue
        OUT.mkdir(parents=True, exist_ok=True)
        found = {key: found[key] for key in sections if key in found}
        store.write_text(json.dumps(found, indent=1) + "\n")
        body = "\n".join(sections[key].text(found[key]) for key in found)
        page = f"# {title}\n\n`python benchmarks/{name}.py`\n\n{body}"
        store.with_suffix(".md").write_text(page)


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)
