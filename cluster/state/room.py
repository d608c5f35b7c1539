"""Room on disk: what a run needs at once must fit under `trajectory.max_bytes`. No torch."""

from dataclasses import dataclass

from cluster.state import done, evicted
from distill.checkpoint.manifest import committed_steps
from distill.config import TrainConfig, check
from distill.data.config import TrajectoryConfig
from distill.data.order import Order


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
    oldest block of step O, and step S - 1 must still be possible. With c = keep_last saves, each
    after s steps of B samples, O = S - c s, and step S - 1 begins (c s - 1) B entries later. With
    E entries of the stream to a block, and passes that are not spread, that is

        blocks <= ceil( (c s - 1) B / E ) + 1.

    The saves that come next may be further apart, since older ones were kept under other settings.
    """
    steps = train.keep_last * train.save_every - 1
    blocks = order.most_blocks(steps * order.batch_size)
    for _ in range(train.keep_last):
        oldest, newest = (kept[0], kept[-1]) if kept else (0, 0)
        save = min((newest // train.save_every + 1) * train.save_every, train.max_steps)
        if save <= newest:
            break
        blocks = max(blocks, order.newest_block(save - 1) - order.oldest_block(oldest) + 1)
        kept = [*kept, save][-train.keep_last :]
    needed = blocks * trajectory.block_shards + trajectory.ready_ahead
    return Room(blocks, min(shards, needed))


def check_room(view: done.RunView, trainer_reads: bool) -> done.RunView:
    """What the files say, after it was seen to it that a run cannot come to a stop for want of room
    on disk.

    Raises:
        ConfigError: trajectory.max_bytes holds less than must lie on disk at once.
    """
    trajectory, train, plan = view.config.trajectory, view.config.train, view.plan
    end = max(view.shards, default=-1) + 1  # a longer run before may have made more
    fits = max(plan.shards, end) * plan.shard_bytes <= trajectory.max_bytes
    if fits and not view.recorded:
        return view
    oldest = view.oldest
    first = evicted.first_shard_read(plan.order, trajectory.block_shards, oldest)
    if evicted.forget_evicted(view.run, first):
        view = view.again()
    if fits:
        return view
    given = f"trajectory.max_bytes={trajectory.max_bytes:,}"
    if not trainer_reads:
        needed = (plan.shards - first) * plan.shard_bytes
        check(
            needed <= trajectory.max_bytes,
            f"{given} is less than the {needed:,} bytes of the {plan.shards - first} shards that "
            "are made here without training on them; raise it, or use `bowstring run`, which "
            "deletes shards once it is done with them",
        )
        return view
    kept = [step for step in committed_steps(view.run.checkpoints) if step >= oldest]
    room = room_for_training(plan.order, trajectory, train, plan.shards, kept)
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
    return view
