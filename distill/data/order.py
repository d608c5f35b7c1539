"""The order of the trajectory stream: global step -> sample ids. Pure arithmetic, no state.

Samples 0, 1, 2, .. are cut into blocks of n = `block_samples`. Each block is read P = `passes`
times, each time in another order drawn from (seed, block, pass). The stream is a sequence of slots;
slot j begins block j. The passes of a block are spread over a window of up to W = `spread` slots,
no wider than there were blocks when it began:

    pass p of block b  is read in slot  b + floor(p w / P),   w = min(W, b + 1)

So the first block is read at once, the window widens as blocks come, and from slot 2 W - 2 on every
slot has P passes, of blocks whose ages are equally far apart. Within a slot the first pass of each
of its blocks is a round, the second pass of each is the next, and so on. A round of m passes takes
its samples in turn:

    entry e of a round:  pass e mod m of the round, its sample number e div m

With W = 1 a block is read P times in a row, and then comes the next.

Global batch s takes the entries s B .. (s + 1) B - 1; it may span the border of a round or a slot.
Rank r of W takes those whose index within the batch is r mod W. So the sequence of samples is fixed
by (seed, n, P, W, B), whatever the number of ranks or restarts.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from distill.flow.noise import permutation

Round = tuple[tuple[int, int], ...]  # (block, pass) of what is read in turn, newest block first


@dataclass(frozen=True)
class Order:
    """The plan of one run's stream.

    Attributes:
        seed: the run's seed.
        block_samples: samples of one block.
        passes: times each block is read.
        batch_size: samples of a global batch.
        spread: slots over which the passes of a block are spread.
    """

    seed: int
    block_samples: int
    passes: int
    batch_size: int
    spread: int = 1

    def __post_init__(self) -> None:
        assert min(self.block_samples, self.passes, self.batch_size, self.spread) > 0

    # ---------------------------------------------------------------------------------------
    # Samples

    def entries(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and passes of the entries of global batch `step`, int64 [B] each, all from 0."""
        return self.entries_between(step * self.batch_size, (step + 1) * self.batch_size)

    def entries_between(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and passes of the entries first .. end - 1 of the whole stream."""
        ids, passes = [], []
        for part, place in self._rounds_from(first):
            chosen = slice(place, place + end - first)
            of_round = _entries(self.seed, self.block_samples, part)
            ids.append(of_round[0][chosen])
            passes.append(of_round[1][chosen])
            first += len(ids[-1])
            if first >= end:
                break
        return np.concatenate(ids), np.concatenate(passes)

    def _rounds_from(self, entry: int) -> Iterator[tuple[Round, int]]:
        """The rounds from that of an entry on, and the place in each where to begin."""
        slot = self._slot(entry)
        place = entry - self._first_pass(slot) * self.block_samples
        while True:
            for part in self._rounds(slot):
                size = len(part) * self.block_samples
                if place < size:
                    yield part, place
                place = max(0, place - size)
            slot += 1

    # ---------------------------------------------------------------------------------------
    # Slots

    def _width(self, block: int) -> int:
        """Slots over which the passes of a block are spread."""
        return min(self.spread, block + 1)

    def _last_slot(self, block: int) -> int:
        """The slot with the last pass of a block. It rises with the block."""
        return block + (self.passes - 1) * self._width(block) // self.passes

    def _parts(self, slot: int) -> list[tuple[int, range]]:
        """The blocks that a slot may read, newest first, and which of their passes it reads."""
        found = []
        for age in range(min(self.spread, slot + 1)):
            block = slot - age
            width = self._width(block)
            first, end = (-(-a * self.passes // width) for a in (age, age + 1))
            found.append((block, range(first, min(end, self.passes))))
        return found

    def _oldest(self, slot: int) -> int:
        """The oldest block that a slot or a later one reads."""
        blocks = range(max(0, slot - self.spread + 1), slot + 1)
        return next(block for block in blocks if self._last_slot(block) >= slot)

    def _rounds(self, slot: int) -> list[Round]:
        """What a slot reads, in order."""
        parts = self._parts(slot)
        return [
            tuple((block, passes[turn]) for block, passes in parts if turn < len(passes))
            for turn in range(max(len(passes) for _, passes in parts))
        ]

    @cached_property
    def _ramp(self) -> list[int]:
        """Passes before each of the slots 0 .. 2 W - 2, until the window is as wide as it gets."""
        slots = range(2 * self.spread - 2)
        lengths = (sum(len(passes) for _, passes in self._parts(slot)) for slot in slots)
        return list(accumulate(lengths, initial=0))

    def _first_pass(self, slot: int) -> int:
        """Passes before a slot."""
        wide = len(self._ramp) - 1
        return self._ramp[min(slot, wide)] + max(0, slot - wide) * self.passes

    def _slot(self, entry: int) -> int:
        """The slot of an entry."""
        done, wide = entry // self.block_samples, len(self._ramp) - 1
        if done >= self._ramp[wide]:
            return wide + (done - self._ramp[wide]) // self.passes
        return bisect_right(self._ramp, done) - 1

    # ---------------------------------------------------------------------------------------
    # Blocks

    def newest_block(self, step: int) -> int:
        """The newest block when global batch `step` begins: that of its slot."""
        return self._slot(step * self.batch_size)

    def oldest_block(self, step: int) -> int:
        """The oldest block that global batch `step` or a later one may read."""
        return self._oldest(self.newest_block(step))

    def blocks_of(self, step: int) -> range:
        """The blocks at hand in global batch `step`: those it reads, and those between."""
        return range(self.oldest_block(step), self.num_blocks(step + 1))

    def blocks_read(self, step: int) -> list[int]:
        """The blocks that global batch `step` reads, ascending."""
        return np.unique(self.entries(step)[0] // self.block_samples).tolist()

    def num_blocks(self, max_steps: int) -> int:
        """Blocks that the first `max_steps` global batches read."""
        return self._slot(max_steps * self.batch_size - 1) + 1 if max_steps else 0

    def most_ahead(self, entries: int) -> int:
        """By how many blocks the newest one may rise within `entries` entries."""
        return max(last - first for first, last in self._spans(entries))

    def most_blocks(self, entries: int) -> int:
        """Blocks at most from the oldest one at an entry to the newest one `entries` later."""
        return max(last - self._oldest(first) + 1 for first, last in self._spans(entries))

    def _spans(self, entries: int) -> Iterator[tuple[int, int]]:
        """The slot of an entry and that of the entry `entries` later, for every slot of the ramp
        and one after it; the entry is its slot's last.
        """
        for slot in range(len(self._ramp)):
            last = self._first_pass(slot + 1) * self.block_samples - 1
            yield slot, self._slot(last + entries)


@lru_cache(maxsize=4)
def _entries(seed: int, n: int, part: Round) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and passes of a round, int64 [m n] each."""
    ids = [block * n + permutation(seed, f"order/{which}", block, n) for block, which in part]
    mixed = np.stack(ids, axis=1).reshape(-1)
    passes = np.tile(np.array([which for _, which in part], dtype=np.int64), n)
    for values in (mixed, passes):
        values.setflags(write=False)
    return mixed, passes
