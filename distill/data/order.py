"""The order of the trajectory stream: global step -> sample ids. Pure arithmetic, no state.

Samples 0, 1, 2, .. are cut into blocks of n = `block_samples`. Block k is read `passes` times, each
time in another order drawn from (seed, k, pass), and then comes block k + 1:

    entry e:  k = e div (n passes),  pass = (e mod (n passes)) div n,  id = k n + sigma[e mod n]

Global batch s takes the entries s B .. (s + 1) B - 1; it may span the border of a pass or a block.
Rank r of W takes those whose index within the batch is r mod W. So the sequence of samples is fixed
by (seed, n, passes, B), whatever the number of ranks or restarts.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distill.flow.noise import permutation


@dataclass(frozen=True)
class Order:
    """The plan of one run's stream.

    Attributes:
        seed: the run's seed.
        block_samples: samples of one block.
        passes: times each block is read.
        batch_size: samples of a global batch.
    """

    seed: int
    block_samples: int
    passes: int
    batch_size: int

    def __post_init__(self) -> None:
        assert min(self.block_samples, self.passes, self.batch_size) > 0

    def entries(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and passes of the entries of global batch `step`, int64 [B] each, all from 0."""
        return self.entries_between(step * self.batch_size, (step + 1) * self.batch_size)

    def entries_between(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and passes of the entries first .. end - 1 of the whole stream."""
        ids, passes, n = [], [], self.block_samples
        while first < end:
            reading, place = divmod(first, n)
            block, which = divmod(reading, self.passes)
            taken = _shuffle(self.seed, block, which, n)[place : place + end - first]
            ids.append(block * n + taken)
            passes.append(np.full(len(taken), which, dtype=np.int64))
            first += len(taken)
        return np.concatenate(ids), np.concatenate(passes)

    @property
    def block_entries(self) -> int:
        """Entries of the stream that come from one block."""
        return self.block_samples * self.passes

    def blocks_of(self, step: int) -> range:
        """The blocks that global batch `step` reads."""
        first = step * self.batch_size // self.block_entries
        last = ((step + 1) * self.batch_size - 1) // self.block_entries
        return range(first, last + 1)

    def block_of(self, step: int) -> int:
        """The first block that global batch `step` reads."""
        return self.blocks_of(step)[0]

    def num_blocks(self, max_steps: int) -> int:
        """Blocks that the first `max_steps` global batches read."""
        return -(-max_steps * self.batch_size // self.block_entries)


@lru_cache(maxsize=4)
def _shuffle(seed: int, block: int, which: int, n: int) -> NDArray[np.int64]:
    """The order in which reading `which` of a block takes its samples."""
    order = permutation(seed, f"order/{which}", block, n)
    order.setflags(write=False)
    return order
