"""Where the time of a training step goes: a clock of its phases, and a trace of a few steps."""

import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import profile, schedule

from distill.training.callbacks import Callback, Step

# "other" is what the loop itself does: logs and counts.
PHASES = ("data", "forward", "backward", "optimizer", "save", "other")
SKIPPED, TRACED = 2, 3  # steps of a trace; the first ones allocate, and the profiler warms up


class PhaseClock:
    """Seconds that this rank spent in each phase since they were last read.

    The host runs ahead of a GPU. So a mark there is an event in the GPU's own queue, which nobody
    waits for before the seconds are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.enter("other")

    @property
    def phase(self) -> str:
        """The phase that goes on."""
        return self._marks[-1][0]

    def enter(self, phase: str) -> None:
        """What follows, up to the next call, is `phase`."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last call; the phase goes on. Waits for the device."""
        self.enter(self.phase)
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


class Profiler(Callback):
    """Writes a trace of a few steps of this rank, named after the first of them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._open = ExitStack()
        self._profile: profile | None = None

    def begin(self, done: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{done + SKIPPED:08d}-rank_{self._rank:05d}.json.gz"
        self._profile = self._open.enter_context(
            profile(
                schedule=schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1),
                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
                record_shapes=True,
            )
        )

    def step(self, step: Step) -> None:
        assert self._profile is not None
        self._profile.step()

    def close(self) -> None:
        self._open.close()
