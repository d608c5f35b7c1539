"""What a run reads and makes: pure arithmetic on its settings. No torch."""

from dataclasses import dataclass

from cluster.settings.schema import RunConfig
from distill.data import layout, sidecar
from distill.data.order import Order
from distill.run.identity import StreamRecord


@dataclass(frozen=True)
class StreamPlan:
    """What the steps of a run read.

    Attributes:
        order: in which order.
        blocks, shards, samples: how many are made.
        sample_bytes: bytes of one sample on disk: its part of a tar and of a sidecar.
        shard_bytes: bytes of one tar.
        num_bytes: bytes of all tars together; at most trajectory.max_bytes lie on disk at once.
    """

    order: Order
    blocks: int
    shards: int
    samples: int
    sample_bytes: int
    shard_bytes: int
    num_bytes: int


def stream_plan(config: RunConfig) -> StreamPlan:
    """Order, blocks, shards, samples and bytes that the training steps of a configuration need."""
    trajectory, order = config.trajectory, stream_order(config)
    blocks = order.num_blocks(config.train.max_steps)
    shards = blocks * trajectory.block_shards
    fingerprints = {name: 64 * "0" for name in config.teacher}
    spec = sidecar.shard_spec(
        config.seed, config.data.image, trajectory, config.teacher, fingerprints
    )
    tar, record = layout.tar_bytes(spec), layout.sidecar_bytes(spec, shards - 1)
    return StreamPlan(
        order=order,
        blocks=blocks,
        shards=shards,
        samples=shards * trajectory.samples_per_shard,
        sample_bytes=round((tar + record) / trajectory.samples_per_shard),
        shard_bytes=tar,
        num_bytes=shards * tar,
    )


def stream_of(config: RunConfig) -> StreamRecord:
    """What the reading order of a configuration follows from, as run.json keeps it."""
    return StreamRecord(
        seed=config.seed,
        samples_per_shard=config.trajectory.samples_per_shard,
        block_shards=config.trajectory.block_shards,
        passes=config.trajectory.passes,
        batch_size=config.train.batch_size,
        spread=config.trajectory.spread,
    )


def order_of(stream: StreamRecord) -> Order:
    """The reading order."""
    block_samples = stream.block_shards * stream.samples_per_shard
    return Order(stream.seed, block_samples, stream.passes, stream.batch_size, stream.spread)


def stream_order(config: RunConfig) -> Order:
    """The reading order of a configuration, without its plan: for a rank."""
    return config.trajectory.order(config.seed, config.train.batch_size)
