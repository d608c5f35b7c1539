"""Stop signals in the ranks of a trainer group. Light: Ray Train's controller imports it too.

A rank that gets SIGTERM or SIGUSR1 sets a flag; the loop sees it at the next step, saves and ends.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

stop_signal = threading.Event()


class SignalBackend(_TorchBackend):
    """Ray's process-group set-up, and a flag for stop signals.

    Python takes signals in the main thread, and Ray Train runs its function in another one; this
    hook is called in the main thread of every rank.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_catchstop_signals)


@dataclass
class SignalConfig(TorchConfig):
    """Ray's settings of the process group, with the hook above."""

    @property
    def backend_cls(self) -> type[SignalBackend]:
        return SignalBackend


def _catchstop_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop_signal.set())
