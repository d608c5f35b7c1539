"""The jobs of a run on a real Slurm of four nodes: how soon they start, save, go on and grow.

    python benchmarks/slurm.py              five rounds; about half an hour on two cores
    python benchmarks/slurm.py --quick      two rounds; writes nothing

The tables go to docs/benchmarks/slurm.{json,md}. The nodes are this machine's (tests/slurm), so
most of every time is the start of Ray and of processes that import torch, one after the other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sections import Section, main
from benchmarks.slurm import times as slurm_times

SECTIONS = {"times": Section("From one thing to another", slurm_times)}

if __name__ == "__main__":
    main("slurm", "Jobs on Slurm", __doc__, SECTIONS)
