"""Progress of the long stages: bars on a terminal, elsewhere a line now and then."""

import time

from rich import progress
from rich.console import Console

LINE_PERIOD_S = 30.0


class StageBars:
    """One bar per stage, on standard error. Entering it starts afresh."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._progress = self._new()
        self._tasks: dict[str, progress.TaskID] = {}
        self._state: dict[str, tuple[int, int, str]] = {}
        self._next_line_s = time.monotonic() + LINE_PERIOD_S

    def _new(self) -> progress.Progress:
        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._live,
        )

    def __enter__(self) -> "StageBars":
        self._progress = self._new()
        self._tasks, self._state = {}, {}
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Sets a bar, made when it is first shown."""
        self._state[stage] = (done, total, note)
        if self._live:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total, note=note)
            self._progress.update(self._tasks[stage], completed=done, total=total, note=note)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_PERIOD_S
            self.say(", ".join(_line(name, *state) for name, state in self._state.items()))

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _line(stage: str, done: int, total: int, note: str) -> str:
    return f"{stage} {done}/{total}" + (f" ({note})" if note else "")
