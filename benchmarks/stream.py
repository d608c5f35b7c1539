"""The trajectory stream: what it costs against doing without, and what it gains.

    python benchmarks/stream.py                     all; about half an hour
    python benchmarks/stream.py shards overlap      some sections; the others stay as they were
    python benchmarks/stream.py --quick             fewer rounds; writes nothing

Sections: shards, waiting, teachers, coordinator, overlap, elasticity; each is a file next to this
one. What is compared in a section is measured in one run of it, in turn. Whole sections go to
docs/benchmarks/stream.{json,md}, with the load of the machine before them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import (  # noqa: E402
    stream_coordinator,
    stream_elastic,
    stream_overlap,
    stream_shards,
    stream_teachers,
    stream_waiting,
)

SECTIONS = {
    "shards": ("Shards against plain webdataset", stream_shards),
    "waiting": ("What a trainer waits for", stream_waiting),
    "teachers": ("Teacher loop against bare solver loops", stream_teachers),
    "coordinator": ("Coordinator", stream_coordinator),
    "overlap": ("Overlap", stream_overlap),
    "elasticity": ("Elasticity", stream_elastic),
}
OUT = ROOT / "docs" / "benchmarks"


def measure(name: str, quick: bool) -> dict[str, Any]:
    """What a section finds, with when and where."""
    load, began = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bowstring-") as folder:
        found = SECTIONS[name][1].measure(quick, Path(folder))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU used",
        "load_before": round(load, 2),
        "minutes": round((time.monotonic() - began) / 60, 1),
        **found,
    }


def page(name: str, found: dict[str, Any]) -> str:
    """A section in Markdown."""
    title, section = SECTIONS[name]
    return (
        f"## {title}\n\n{section.page(found)}\n\n{found['date']}; {found['machine']}; load before "
        f"{found['load_before']}, {found['minutes']} minutes.\n"
    )


def main() -> None:
    """Measures, prints, and writes the pages unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    store = OUT / "stream.json"
    found = json.loads(store.read_text()) if store.exists() else {}
    for name in options.sections:
        found[name] = measure(name, options.quick)
        print(page(name, found[name]), flush=True)
        if options.quick:
            print(json.dumps(found[name]))
            continue
        OUT.mkdir(parents=True, exist_ok=True)
        found = {name: found[name] for name in SECTIONS if name in found}
        store.write_text(json.dumps(found, indent=1) + "\n")
        body = "\n".join(page(name, found[name]) for name in found)
        (OUT / "stream.md").write_text(f"# The stream\n\n`python benchmarks/stream.py`\n\n{body}")


if __name__ == "__main__":
    main()
