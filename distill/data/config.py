"""Settings of the trajectory stream. No torch."""

from dataclasses import dataclass, field

from distill.config import check, check_choice, check_positive, free, since
from distill.data.order import Order


def check_location(location: str) -> None:
    """Raises ConfigError unless trajectory.location may be written into files and messages."""
    protocol, is_url, rest = location.partition("://")
    # Not repeated in the message: it is a secret.
    check(
        not is_url or not set("@?*[") & set(rest),
        f"trajectory.location={protocol}://... must be a plain address without user, password, "
        "question mark or pattern; credentials come from the environment (docs/operations.md)",
    )
    check(
        protocol != "file" or not is_url,
        f"trajectory.location={location}: give a folder as a path, without file://",
    )


@dataclass
class TrajectoryConfig:
    """The trajectory stream: what a shard holds and in which order it is read (docs/formats.md)."""

    grid: int = 8  # K: the solver passes t = 0, 1/K .. 1
    store_points: list[int] = field(default_factory=list)  # k of the stored k/K; []: 0 .. K
    samples_per_shard: int = 256  # trajectories in one file
    block_shards: int = 1  # shards read together
    passes: int = 4  # times each block is read
    # Blocks over which the passes of one are spread; 1: a block is read `passes` times in a row
    spread: int = since("0.3", 16, before=1)
    dtype: str = "float16"  # float16 | bfloat16 | float32, as stored
    store_noise: bool = True  # false: the reader makes it again from the sample id
    store_velocity: bool = False  # the teacher's velocity at every stored point: twice the bytes
    batch_size: int = 256  # samples a teacher integrates at once, if its memory suffices
    ready_ahead: int = free(16)  # shards at most beyond the newest block that is read
    # Of the shards: a folder or an fsspec URL; "" is shards in the run's folder
    location: str = free("")
    max_bytes: int = free(20_000_000_000)  # shards at most on disk, bytes
    wait_timeout_s: float = free(900.0)  # without a new shard, then a reader fails

    def __post_init__(self) -> None:
        check_positive(
            "trajectory",
            grid=self.grid,
            samples_per_shard=self.samples_per_shard,
            block_shards=self.block_shards,
            passes=self.passes,
            spread=self.spread,
            batch_size=self.batch_size,
            wait_timeout_s=self.wait_timeout_s,
        )
        check_choice("trajectory.dtype", self.dtype, ("float16", "bfloat16", "float32"))
        check_location(self.location)
        check(
            self.points == sorted({*self.points})
            and (self.points[0], self.points[-1]) == (0, self.grid),
            f"trajectory.store_points={self.store_points} must rise from 0, the noise, to "
            f"trajectory.grid={self.grid}, the image",
        )
        check(
            self.ready_ahead >= self.block_shards,
            f"trajectory.ready_ahead={self.ready_ahead} must be at least trajectory.block_shards="
            f"{self.block_shards}, or the reader would wait for a block that may not be made",
        )

    @property
    def points(self) -> list[int]:
        """The grid points k that are stored, t = k/K; 0 and K are among them."""
        return list(self.store_points) or list(range(self.grid + 1))

    def order(self, seed: int, batch_size: int) -> Order:
        """The order in which global batches of `batch_size` read the stream of a seed."""
        return Order(seed, self.block_samples, self.passes, batch_size, self.spread)

    @property
    def block_samples(self) -> int:
        """Samples in one block."""
        return self.block_shards * self.samples_per_shard
