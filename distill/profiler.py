"""A trace of a few steps by torch.profiler, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule

SKIPPED, TRACED = 2, 3  # steps; the first ones allocate, and the profiler warms up


@contextmanager
def traced_steps(folder: Path, start: int, rank: int, enabled: bool) -> Iterator[Callable[[], Any]]:
    """A function to be called after every step; the trace of this rank is in `folder` afterwards.

    The file is named after the first step traced. Nothing happens unless `enabled`.
    """
    if not enabled:
        yield lambda: None
        return
    path = folder / f"step_{start + SKIPPED:08d}-rank_{rank:05d}.json.gz"
    folder.mkdir(parents=True, exist_ok=True)
    with profile(
        schedule=schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        record_shapes=True,
    ) as profiler:
        yield profiler.step
