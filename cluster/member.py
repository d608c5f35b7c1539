"""A teacher worker as the pool sees it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any


@dataclass(eq=False)
class Member:
    """An actor as the pool sees it. `task` is its pending load or shard, None when it is idle."""

    actor: Any
    task: Any
    ping: Any  # pending question for its name and progress
    name: str = ""  # known once it has a process, which may have to wait for a node
    shard: int | None = None
    samples: int = -1
    expires_s: float = inf  # its teachers must be loaded by then
    leaves: bool = False  # it goes when its shard is done

    @property
    def is_loading(self) -> bool:
        """Whether its teachers are still being loaded."""
        return self.task is not None and self.shard is None
