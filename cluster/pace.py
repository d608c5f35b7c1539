"""How often something costly is done: so rarely that it takes little of the time and of a core."""

from __future__ import annotations

import time

PARTS_OF_TIME = 10  # waiting for a disk or a network: a tenth of the time
PARTS_OF_CORE = 50  # computing: a fiftieth of a core


class Pace:
    """`is_due`, then the work, then `done`."""

    def __init__(self) -> None:
        self._next_s = self._began_s = self._began_cpu_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """Whether it shall be done now; if so, it counts from here."""
        self._began_s, self._began_cpu_s = now_s, time.thread_time()
        return now_s >= self._next_s

    def done(self, period_s: float) -> None:
        """It is done; the next time comes in `period_s` at least, counted from its beginning."""
        wall = time.monotonic() - self._began_s
        core = time.thread_time() - self._began_cpu_s
        self._next_s = self._began_s + max(period_s, PARTS_OF_TIME * wall, PARTS_OF_CORE * core)
