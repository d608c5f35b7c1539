"""Shards that were deleted for room: which may go, and the record of those that went.

A resume from checkpoint N reads the oldest block of which step N leaves a pass, and later ones. So
no shard before that block of the oldest checkpoint that is kept and verifies is ever read again.
When `trajectory.max_bytes` needs their room, their tars are deleted. Their sidecars stay, as proof
of what was read.

    event `evict` -> evicted.json -> tars deleted

A kill in between leaves tars that the record calls gone. A tar that is there is not evicted,
whatever the record says. Needs no torch.
"""

import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from distill.checkpoint.manifest import committed_steps, verify_once
from distill.config import ConfigError
from distill.data.order import Order
from distill.data.stores.store import open_store
from distill.run import events, files, records

# -----------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Evicted:
    """evicted.json: ranges of shards, both ends included."""

    shards: tuple[tuple[int, ...], ...]


def recorded(run: files.RunDir) -> set[int]:
    """The shards that evicted.json names.

    Raises:
        ConfigError: it is corrupt. It stays where it is; nothing overwrites it.
    """
    try:
        ranges = records.read_record(Evicted, run.evicted).shards
        return {shard for first, last in ranges for shard in range(first, last + 1)}
    except FileNotFoundError:
        return set()
    except ValueError as error:  # RecordError, or a range that has not two ends
        raise ConfigError(
            f"{run.evicted} is corrupt ({error}) and was left as it is; put back a copy, or move "
            "it away to have the shards it names made again"
        ) from error


def read_evicted(run: files.RunDir, found: Collection[int]) -> set[int]:
    """The shards that were made and deleted for room. `found` are the committed ones."""
    return recorded(run).difference(found)


def evict(run: files.RunDir, shards: tuple[int, ...], step: int) -> None:
    """Deletes the tars of `shards`, which lie behind the checkpoint of `step`."""
    events.append(run, events.Evict(shards, step))
    _record(run, recorded(run) | set(shards))
    open_store(run).delete_tars(shards)


def forget_evicted(run: files.RunDir, first_shard: int) -> bool:
    """Has the evicted shards from `first_shard` on made again: the checkpoint behind them is gone,
    so training reads them once more. Whether there are any.
    """
    again = tuple(sorted(shard for shard in recorded(run) if shard >= first_shard))
    if again:
        events.append(run, events.MakeAgain(again))
        _record(run, recorded(run) - set(again))
    return bool(again)


def _record(run: files.RunDir, shards: set[int]) -> None:
    files.write_json(run.evicted, records.tree_of(Evicted(ranges_of(shards))))


def ranges_of(shards: set[int]) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive numbers as (first, last), in order."""
    starts = sorted(shard for shard in shards if shard - 1 not in shards)
    ends = sorted(shard for shard in shards if shard + 1 not in shards)
    return tuple(zip(starts, ends, strict=True))


# -----------------------------------------------------------------------------------------------
# What may go


def oldest_verified(checkpoints: Path) -> int:
    """Step of the oldest checkpoint that verifies; 0 when there is none."""
    there = committed_steps(checkpoints).items()
    return next((step for step, folder in there if not verify_once(folder)), 0)


class OldestCheckpoint:
    """`oldest_verified`, looked for in a thread: hashing a large checkpoint takes a while."""

    def __init__(self, run: files.RunDir) -> None:
        self.step = 0
        self._run = run
        self._looking = threading.Thread()

    def look(self) -> int:
        """The step as it was found last, 0 at first; starts another look."""
        if not self._looking.is_alive():
            self._looking = threading.Thread(target=self._look, daemon=True)
            self._looking.start()
        return self.step

    def _look(self) -> None:
        self.step = oldest_verified(self._run.checkpoints)


def first_shard_read(order: Order, block_shards: int, step: int) -> int:
    """The lowest shard that a resume from the checkpoint of `step` reads."""
    return order.oldest_block(step) * block_shards
