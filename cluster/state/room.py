"""Room on disk: which shards may go, that all others fit, and the record of those that went.

A resume from checkpoint N reads the block of step N and later ones. So no shard before the block of
the oldest checkpoint that is kept and verifies is ever read again. When `trajectory.max_bytes`
needs their room, their tars are deleted. Their sidecars stay, as proof of what was read.

    event `evict` -> evicted.json -> tars deleted

A kill in between leaves tars that the record calls gone. A tar that is there is not evicted,
whatever the record says. Needs no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cluster.plan.stream import StreamPlan, stream_order
from cluster.settings.schema import RunConfig
from distill.checkpoint.manifest import committed_steps, verify_once
from distill.config import ConfigError, TrainConfig, check
from distill.data.config import TrajectoryConfig
from distill.data.order import Order
from distill.data.stores.store import committed, open_store
from distill.run.dir import RunDir
from distill.run.events import Evict, MakeAgain, append
from distill.run.files import write_json
from distill.run.records import read_record, tree_of

# -----------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Evicted:
    """evicted.json: ranges of shards, both ends included."""

    shards: tuple[tuple[int, ...], ...]


def recorded(run: RunDir) -> set[int]:
    """The shards that evicted.json names.

    Raises:
        ConfigError: it is corrupt. It stays where it is; nothing overwrites it.
    """
    try:
        ranges = read_record(Evicted, run.evicted).shards
        return {shard for first, last in ranges for shard in range(first, last + 1)}
    except FileNotFoundError:
        return set()
    except ValueError as error:  # RecordError, or a range that has not two ends
        raise ConfigError(
            f"{run.evicted} is corrupt ({error}) and was left as it is; put back a copy, or move "
            "it away to have the shards it names made again"
        ) from error


def read_evicted(run: RunDir, found: Collection[int]) -> set[int]:
    """The shards that were made and deleted for room. `found` are the committed ones."""
    return recorded(run).difference(found)


def evict(run: RunDir, shards: tuple[int, ...], step: int) -> None:
    """Deletes the tars of `shards`, which lie behind the checkpoint of `step`."""
    append(run, Evict(shards, step))
    _record(run, recorded(run) | set(shards))
    open_store(run).delete_tars(shards)


def forget_evicted(run: RunDir, first_shard: int) -> None:
    """Has the evicted shards from `first_shard` on made again: the checkpoint behind them is gone,
    so training reads them once more.
    """
    again = tuple(sorted(shard for shard in recorded(run) if shard >= first_shard))
    if again:
        append(run, MakeAgain(again))
        _record(run, recorded(run) - set(again))


def _record(run: RunDir, shards: set[int]) -> None:
    write_json(run.evicted, tree_of(Evicted(ranges_of(shards))))


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

    def __init__(self, run: RunDir) -> None:
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
    return order.block_of(step) * block_shards


# -----------------------------------------------------------------------------------------------
# What must fit


@dataclass(frozen=True)
class Room:
    """Shards that must fit on disk at once.

    Attributes:
        blocks: blocks that training reads between the oldest checkpoint kept and the next save.
        shards: of those blocks and of what is made ahead.
    """

    blocks: int
    shards: int


def room_for_training(
    order: Order, trajectory: TrajectoryConfig, train: TrainConfig, shards: int, kept: list[int]
) -> Room:
    """Room for `shards` shards in all, when checkpoints of the steps `kept` exist now.

    Just before the save of step S the oldest checkpoint is of step O. A fall back would read the
    block of step O, and step S - 1 must still be possible. With c = keep_last saves, each after s
    steps of B samples, and E entries of the stream to a block, O = S - c s and

        blocks <= ceil( (c s - 1) B / E ) + 1.

    The saves that come next may be further apart, since older ones were kept under other settings.
    """
    steps = train.keep_last * train.save_every - 1
    blocks = -(-steps * order.batch_size // order.block_entries) + 1
    for _ in range(train.keep_last):
        oldest, newest = (kept[0], kept[-1]) if kept else (0, 0)
        save = min((newest // train.save_every + 1) * train.save_every, train.max_steps)
        if save <= newest:
            break
        blocks = max(blocks, order.block_of(save - 1) - order.block_of(oldest) + 1)
        kept = [*kept, save][-train.keep_last :]
    needed = blocks * trajectory.block_shards + trajectory.ready_ahead
    return Room(blocks, min(shards, needed))


def check_room(config: RunConfig, run: RunDir, plan: StreamPlan, trainer_reads: bool) -> None:
    """Sees to it that a run cannot come to a stop for want of room on disk.

    Raises:
        ConfigError: trajectory.max_bytes holds less than must lie on disk at once.
    """
    trajectory, train, order = config.trajectory, config.train, stream_order(config)
    end = max(committed(run), default=-1) + 1  # a longer run before may have made more
    fits = max(plan.shards, end) * plan.shard_bytes <= trajectory.max_bytes
    if fits and not recorded(run):
        return
    oldest = oldest_verified(run.checkpoints)
    first = first_shard_read(order, trajectory.block_shards, oldest)
    forget_evicted(run, first)
    if fits:
        return
    given = f"trajectory.max_bytes={trajectory.max_bytes:,}"
    if not trainer_reads:
        needed = (plan.shards - first) * plan.shard_bytes
        check(
            needed <= trajectory.max_bytes,
            f"{given} is less than the {needed:,} bytes of the {plan.shards - first} shards that "
            "are made here without training on them; raise it, or use `bowstring run`, which "
            "deletes shards once it is done with them",
        )
        return
    kept = [step for step in committed_steps(run.checkpoints) if step >= oldest]
    room = room_for_training(order, trajectory, train, plan.shards, kept)
    there = end - first
    needed = max(room.shards, there) * plan.shard_bytes
    check(
        needed <= trajectory.max_bytes,
        f"{given} is less than the {needed:,} bytes of the {max(room.shards, there)} shards that "
        f"must lie on disk at once: {room.blocks} blocks of {trajectory.block_shards} from the "
        f"oldest checkpoint to the next save, trajectory.ready_ahead={trajectory.ready_ahead}, and "
        f"{max(there, 0)} that are there and still needed; raise it, or lower train.save_every="
        f"{train.save_every}, train.keep_last={train.keep_last} or ready_ahead",
    )
