"""The order of the trajectory stream, as arithmetic: global step -> sample ids. No torch.

The samples are cut into blocks of consecutive ids. Each block is shuffled by (seed, block, pass)
and read `passes` times, then the next block. Global batch n is the next `batch_size` entries; rank
r of W takes those with index = r mod W. So position = global step, and nothing else is ever saved.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from distill.noise import permutation


@dataclass(frozen=True)
class Order:
    """Which sample ids each global batch holds.

    Attributes:
        seed: of the shuffles.
        block_samples: samples shuffled together.
        passes: times each block is read.
        batch_size: samples of a global batch.
    """

    seed: int
    block_samples: int
    passes: int
    batch_size: int

    @property
    def block_entries(self) -> int:
        """Entries of the stream that come from one block."""
        return self.block_samples * self.passes

    def entries(self, step: int) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
        """(ids, passes) of global batch `step`, in stream order; both from 0."""
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        block, within = np.divmod(index, self.block_entries)
        read, place = np.divmod(within, self.block_samples)
        ids = np.empty_like(index)
        for b, p in np.unique(np.stack([block, read]), axis=1).T.tolist():
            here = (block == b) & (read == p)
            order = _shuffle(self.seed, self.block_samples, self.passes, b, p)
            ids[here] = b * self.block_samples + order[place[here]]
        return ids, read

    def blocks_of(self, step: int) -> range:
        """Blocks that global batch `step` reads."""
        first = step * self.batch_size // self.block_entries
        last = ((step + 1) * self.batch_size - 1) // self.block_entries
        return range(first, last + 1)

    def block_of(self, step: int) -> int:
        """First block that global batch `step` reads."""
        return self.blocks_of(step)[0]

    def num_blocks(self, max_steps: int) -> int:
        """Blocks that `max_steps` global batches need."""
        return -(-max_steps * self.batch_size // self.block_entries)


@lru_cache(maxsize=8)
def _shuffle(
    seed: int, block_samples: int, passes: int, block: int, read: int
) -> Int64[np.ndarray, "n"]:
    """The order in which one pass reads a block."""
    return permutation(seed, "shuffle", block * passes + read, block_samples)
