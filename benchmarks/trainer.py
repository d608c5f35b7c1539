"""The trainer: what ZeRO and the loop cost on one rank, what a checkpoint costs, and a kill.

    python benchmarks/trainer.py                    all; about 16 minutes
    python benchmarks/trainer.py checkpoint         one section; the others stay as they were
    python benchmarks/trainer.py --quick            fewer rounds; writes nothing

Sections: overhead, checkpoint, faults; each is a file next to this one. Whole sections go to
docs/benchmarks/trainer.{json,md}.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sections import Section, main
from benchmarks.trainer import (
    checkpoint as trainer_checkpoint,
    faults as trainer_faults,
    overhead as trainer_overhead,
)

SECTIONS = {
    "overhead": Section("A step against a bare loop", trainer_overhead),
    "checkpoint": Section("A checkpoint", trainer_checkpoint),
    "faults": Section("A kill every minute", trainer_faults),
}

if __name__ == "__main__":
    main("trainer", "The trainer", __doc__, SECTIONS)
