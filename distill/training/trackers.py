"""TensorBoard's event files, a copy of metrics.jsonl. The only importer of tensorboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 10  # a kill loses so much of the copy


class EventFile:
    """Scalars of a training that goes on after `start` steps. A thread writes them."""

    def __init__(self, folder: Path, start: int) -> None:
        # Hides what an earlier start wrote of the steps that are now done again.
        self._writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=FLUSH_S)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Adds the numbers of a step; raises OSError if none can be written."""
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Writes what is left. A full disk is said by the logs that this is a copy of."""
        with suppress(OSError):
            self._writer.close()


def scalars(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(tag, value) of every number of a line of metrics.jsonl but the step; nested ones as
    "terms/output".
    """
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, float(value)
