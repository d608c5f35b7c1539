"""Where the time of a training step goes."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

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
