"""The trajectory stream: what it costs against doing without, and what it gains.

    python benchmarks/stream.py                     all; about half an hour
    python benchmarks/stream.py shards overlap      some sections; the others stay as they were
    python benchmarks/stream.py --quick             fewer rounds; writes nothing

Sections: shards, waiting, teachers, coordinator, overlap, elasticity; each is a file next to this
one. What is compared in a section is measured in one run of it, in turn. Whole sections go to
docs/benchmarks/stream.{json,md}.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.sections import Section, main
from benchmarks.stream import (
    coordinator as stream_coordinator,
    elastic as stream_elastic,
    overlap as stream_overlap,
    shards as stream_shards,
    teachers as stream_teachers,
    waiting as stream_waiting,
)

SECTIONS = {
    "shards": Section("Shards against plain webdataset", stream_shards),
    "waiting": Section("What a trainer waits for", stream_waiting),
    "teachers": Section("Teacher loop against bare solver loops", stream_teachers),
    "coordinator": Section("Coordinator", stream_coordinator),
    "overlap": Section("Overlap", stream_overlap),
    "elasticity": Section("Elasticity", stream_elastic),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main("stream", "The stream", __doc__, SECTIONS)
