"""The trajectory stream: committed shards -> this rank's part of each global batch.

Position is the global step and nothing else (`distill.data.order`). A block of shards is decoded
into one array in memory, once: it stays there until its last pass is read. While the trainer works,
one thread loads the next block and another makes the next batch; no more than that is held. A shard
that is not there yet is waited for, in words that others can see; a bad one is set aside, so that
it is made again, and waited for too.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int

from distill.config import ConfigError, check
from distill.data import config, layout, shards, sidecar
from distill.data.lookout import Lookout
from distill.data.order import Order
from distill.data.stores.store import open_store
from distill.flow.noise import sample_noise
from distill.flow.trajectory import TrajectoryBatch
from distill.run import files

POLL_S = 0.1  # how often a wait looks up


class StreamError(RuntimeError):
    """The stream cannot go on. The message says what it waited for."""


@dataclass(frozen=True)
class Block:
    """A block in memory.

    Attributes:
        first_id: id of the first sample.
        states: [n, M, points, C, H, W] in the stored dtype; behind them the velocities, if stored.
        labels: [n].
        noise: [n, C, H, W] float32 when the shards do not hold it.
        num_states: points that are states.
    """

    first_id: int
    states: Float[torch.Tensor, "n M P *S"]
    labels: Int[torch.Tensor, "n"]
    noise: Float[torch.Tensor, "n *S"] | None
    num_states: int

    def trajectories(
        self, ids: Int[torch.Tensor, "B"]
    ) -> tuple[Float[torch.Tensor, "B M K1 *S"], Float[torch.Tensor, "B M V *S"]]:
        """States 0 .. K of some samples and as many velocities, or none; float32."""
        rows = ids - self.first_id
        stored = self.states[rows].float()
        states, velocities = stored[:, :, : self.num_states], stored[:, :, self.num_states :]
        if self.noise is not None:
            noise = self.noise[rows][:, None, None]
            noise = noise.expand(-1, states.shape[1], *noise.shape[2:])
            states = torch.cat([noise, states], dim=2)
        return states, velocities


class TrajectoryStream:
    """One rank's view of the stream. `read` may be called for any step; rising steps are fast."""

    def __init__(
        self,
        run: files.RunDir,
        spec: sidecar.ShardSpec,
        trajectory: config.TrajectoryConfig,
        order: Order,
        rank: int,
        world_size: int,
        weights: list[list[float]],
        should_stop: Callable[[], bool],
    ) -> None:
        """`weights` has those of the teachers for each class, or one row for all (`weight_table` of
        the teachers' settings); `should_stop` ends a wait.

        Raises:
            ConfigError: the batch cannot be divided among the ranks.
        """
        check(
            order.batch_size % world_size == 0,
            f"train.batch_size={order.batch_size} must be a multiple of the {world_size} ranks",
        )
        assert len(weights[0]) == len(spec.teachers)
        assert order.block_samples % spec.samples_per_shard == 0
        self._run, self._spec, self._order = run, spec, order
        self._timeout_s, self._should_stop = trajectory.wait_timeout_s, should_stop
        self._positions = np.arange(rank, order.batch_size, world_size)
        self._weights = torch.tensor(weights)
        self._times = torch.tensor(spec.times)
        self._loading: dict[int, _Loading] = {}
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._ahead: tuple[int, Future[TrajectoryBatch]] | None = None
        self._wait_s = 0.0
        self._waiting_for = ""

    @property
    def wait_s(self) -> float:
        """Seconds that `read` has kept its caller so far."""
        return self._wait_s

    @property
    def waiting_for(self) -> str:
        """What `read` waits for at this moment; "" when it does not wait."""
        return self._waiting_for

    def read(self, step: int) -> TrajectoryBatch | None:
        """This rank's part of global batch `step`; None when told to stop while it waited for data.

        Raises:
            ForeignShard: a shard was made for another run.
            StreamError: no shard came for `trajectory.wait_timeout_s`.
        """
        began = time.monotonic()
        at_hand = self._order.blocks_of(step)
        self._load(range(at_hand[0], at_hand[-1] + 2))
        try:
            if self._ahead is not None and self._ahead[0] == step:
                batch = self._ahead[1].result()
            else:
                needed = self._order.blocks_read(step)
                batch = self._make(step, {number: self._wait(number) for number in needed})
        except _ToldToStop:
            return None
        self._ahead = self._make_ahead(step + 1)
        self._wait_s += time.monotonic() - began
        return batch

    def close(self) -> None:
        """Ends the loading."""
        self._load(range(0))
        self._maker.shutdown(cancel_futures=True)

    def _make_ahead(self, step: int) -> tuple[int, Future[TrajectoryBatch]] | None:
        """The batch of `step` on its way; None when a block of it is not in memory yet."""
        blocks = {}
        for number in self._order.blocks_read(step):
            block = self._loading[number].block if number in self._loading else None
            if block is None:
                return None
            blocks[number] = block
        return step, self._maker.submit(self._make, step, blocks)

    def _make(self, step: int, blocks: Mapping[int, Block]) -> TrajectoryBatch:
        """This rank's part of global batch `step`, from the blocks that it reads."""
        ids = torch.from_numpy(self._order.entries(step)[0][self._positions])
        of_sample = ids // self._order.block_samples
        by_block = torch.argsort(of_sample, stable=True)
        parts = [(block, ids[of_sample == number]) for number, block in sorted(blocks.items())]
        labels = placed([block.labels[part - block.first_id] for block, part in parts], by_block)
        paths = [block.trajectories(part) for block, part in parts]
        states, velocities = zip(*paths, strict=True)
        return TrajectoryBatch(
            states=placed(states, by_block),
            velocities=placed(velocities, by_block) if self._spec.store_velocity else None,
            times=self._times,
            weights=self._weights[labels.clamp(0, len(self._weights) - 1)],
            condition=labels,
            ids=ids,
            positions=torch.from_numpy(self._positions),
            global_size=self._order.batch_size,
        )

    def _load(self, wanted: range) -> None:
        """Starts to load the blocks that are wanted and forgets all others."""
        for number in [number for number in self._loading if number not in wanted]:
            self._loading.pop(number).cancelled = True
        for number in wanted:
            # One that failed ahead of time gets another try: the file server may be back.
            if number not in self._loading or self._loading[number].has_failed:
                self._loading[number] = _Loading(self._run, self._spec, self._order, number)

    def _wait(self, number: int) -> Block:
        """The block, once it is in memory."""
        loading = self._loading[number]
        now = time.monotonic()
        ready, deadline = loading.num_ready, now + self._timeout_s
        while loading.is_alive():
            self._waiting_for = f"block {number}: {loading.doing}"
            loading.join(POLL_S)
            if loading.is_alive() and self._should_stop():
                raise _ToldToStop
            now = time.monotonic()
            if loading.num_ready > ready:
                ready, deadline = loading.num_ready, now + self._timeout_s
            if now > deadline and loading.is_alive():
                raise StreamError(
                    f"no shard came for {self._timeout_s:.0f} s; waited for {self._waiting_for}. "
                    "See `bowstring status` for the teacher workers; to wait longer set "
                    "trajectory.wait_timeout_s"
                )
        self._waiting_for = ""
        return loading.result()


def placed(parts: Sequence[torch.Tensor], places: Int[torch.Tensor, "B"]) -> torch.Tensor:
    """The rows of all parts, each at its place."""
    whole = torch.empty(len(places), *parts[0].shape[1:], dtype=parts[0].dtype)
    for part, rows in zip(parts, places.split([len(part) for part in parts]), strict=True):
        whole[rows] = part
    return whole


class _ToldToStop(Exception):
    """A stop was asked for while a block was waited for."""


class _Loading(threading.Thread):
    """A block on its way into memory."""

    def __init__(
        self, run: files.RunDir, spec: sidecar.ShardSpec, order: Order, block: int
    ) -> None:
        super().__init__(name=f"block-{block}", daemon=True)
        self._run, self._spec = run, spec
        per_block = order.block_samples // spec.samples_per_shard
        self._shards = range(block * per_block, (block + 1) * per_block)
        self.block: Block | None = None  # once all of it is in memory
        self._error: ConfigError | OSError | None = None
        self.num_ready = 0
        self.doing = "about to be read"
        self.cancelled = False
        self.start()

    @property
    def has_failed(self) -> bool:
        """Whether it ended without the block."""
        return not self.is_alive() and self.block is None

    def result(self) -> Block:
        """The block; raises what ended the loading."""
        if self._error is not None:
            raise self._error
        if self.block is None:
            raise StreamError(f"{self.name} could not be loaded; the traceback is printed above")
        return self.block

    def run(self) -> None:
        """Fills the block, shard by shard, as they come."""
        try:
            self._fill()
        except (ConfigError, OSError) as error:
            self._error = error

    def _fill(self) -> None:
        spec, count = self._spec, self._spec.samples_per_shard
        states = np.empty(
            (len(self._shards) * count, *spec.sample_shape), dtype=layout.stored_dtype(spec)
        )
        labels = np.empty(len(states), dtype=np.int64)
        missing, lookout = list(self._shards), Lookout(self._run)
        while missing and not self.cancelled:
            for shard in self._found(lookout, missing):
                first = (shard - self._shards[0]) * count
                part = slice(first, first + count)
                if self._read(shard, states[part], labels[part]):
                    missing.remove(shard)
                    self.num_ready += 1
            if missing:
                self._rest(lookout.pause_s)
        lookout.close()
        if self.cancelled:
            return
        ids = np.arange(spec.ids(self._shards[0])[0], spec.ids(self._shards[-1])[-1] + 1)
        noise = None if spec.store_noise else sample_noise(spec.seed, ids, spec.image)
        self.block = Block(
            first_id=int(ids[0]),
            states=shards.as_tensor(spec, states),
            labels=torch.from_numpy(labels),
            noise=None if noise is None else torch.from_numpy(noise),
            num_states=self._spec.num_states,
        )

    def _found(self, lookout: Lookout, missing: list[int]) -> list[int]:
        """Those that are there. A file server that is away is one of the things waited for."""
        self.doing = f"shard {missing[0]} is not there yet"
        try:
            return lookout.found(missing)
        except OSError as error:
            return self._later(missing[0], error)

    def _later(self, shard: int, error: OSError) -> list[int]:
        """No shard now, for a reason that passes; raises `error` if that is none."""
        if not files.passes(error):
            raise error
        self.doing = f"shard {shard} cannot be read ({error.strerror})"
        return []

    def _rest(self, seconds: float) -> None:
        """Sleeps, unless the block is not wanted any more."""
        end = time.monotonic() + seconds
        while not self.cancelled and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_S))

    def _read(self, shard: int, states: np.ndarray, labels: np.ndarray) -> bool:
        """Whether the shard was there and good. Bytes that are bad are read again first: another
        machine may not see all of them yet.
        """
        store = open_store(self._run)
        read = partial(shards.read_shard, self._run, self._spec, shard, states, labels)
        try:
            seen = store.mark(shard)
            files.patiently(read, sidecar.CorruptShard)
        except FileNotFoundError:  # another rank has set it aside meanwhile
            return False
        except OSError as error:
            return bool(self._later(shard, error))
        except sidecar.CorruptShard as error:
            store.quarantine(shard, str(error), seen)
            return False
        return True
