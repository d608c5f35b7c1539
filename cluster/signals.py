"""Stop signals in the ranks of a trainer group. Light: Ray Train's controller imports it too.

A rank that gets SIGTERM or SIGUSR1 sets a flag; the loop sees it at the next step, saves and ends.
What a rank forks, such as a loader's worker, takes these signals as the system has it: it ends.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

RANK_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
stop_signal = threading.Event()


class SignalBackend(_TorchBackend):
    """Ray's process-group set-up, and a flag for stop signals.

    Python takes signals in the main thread, and Ray Train runs its function in another one; this
    hook is called in the main thread of every rank.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(catch_stop_signals)


@dataclass
class SignalConfig(TorchConfig):
    """Ray's settings of the process group, with the hook above."""

    @property
    def backend_cls(self) -> type[SignalBackend]:
        return SignalBackend


def catch_stop_signals() -> None:
    """From now on a stop signal sets `stop_signal` in this process. For its main thread."""
    for number in RANK_STOP_SIGNALS:
        signal.signal(number, _note)
    os.register_at_fork(after_in_child=_leave_to_the_system)


def _note(*_: Any) -> None:
    stop_signal.set()


def _leave_to_the_system() -> None:
    """In a forked child: the flag there is a copy that nobody reads, and no signal would end it."""
    for number in RANK_STOP_SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)
