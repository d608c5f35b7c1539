"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, schedule

# "other" is what the loop itself does: logs and counts.
PHASES = ("data", "forward", "backward", "optimizer", "save", "other")


class PhaseClock:
    """Seconds that this rank spent in each phase since they were last read.

    The host runs ahead of a GPU. So a mark there is an event in the GPU's own queue, which nobody
    waits for before the seconds are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.enter("other")

    def enter(self, phase: str) -> None:
        """What follows, up to the next call, is `phase`."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last call; the phase goes on. Waits for the device."""
        self.enter(self._marks[-1][0])
        spent = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in pairwise(self._marks):
            spent[phase] += _seconds(start, end)
        self._marks = self._marks[-1:]
        return spent

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - start


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
