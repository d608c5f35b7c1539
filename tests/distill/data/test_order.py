"""The stream shows every sample the planned number of times, whatever the ranks."""

from dataclasses import replace
from operator import sub

import numpy as np
import pytest

from distill.data.order import Order

ORDERS = [
    Order(seed=1, block_samples=12, passes=3, batch_size=12),
    Order(seed=1, block_samples=12, passes=3, batch_size=8),  # spans passes and blocks
    Order(seed=2, block_samples=4, passes=1, batch_size=10),  # spans several blocks at once
    Order(seed=3, block_samples=30, passes=2, batch_size=7),
]
SPREAD = [
    Order(seed=4, block_samples=5, passes=passes, batch_size=7, spread=spread)
    for passes, spread in [(1, 4), (2, 5), (3, 2), (4, 4), (4, 7), (7, 3), (16, 8), (22, 16)]
]
SLOTS = 40


def name(order: Order) -> str:
    return f"{order.passes} passes over {order.spread}"


def begin_of(order: Order, block: int) -> int:
    """The entry that begins a block."""
    enough = order.block_samples * order.passes * block
    ids, _ = order.entries_between(0, enough + 1)
    return int(np.argmax(ids // order.block_samples == block))


# -----------------------------------------------------------------------------------------------
# A block in turn: spread = 1, as every run of version 0.2


@pytest.mark.parametrize("order", ORDERS)
def test_every_block_is_read_whole_and_in_turn(order):
    num_blocks, block_entries = 7, order.block_samples * order.passes
    steps = num_blocks * block_entries // order.batch_size
    batches = [order.entries(step) for step in range(steps + 1)]
    ids = np.concatenate([b[0] for b in batches])[: num_blocks * block_entries]
    passes = np.concatenate([b[1] for b in batches])[: num_blocks * block_entries]
    n = order.block_samples
    for reading in range(num_blocks * order.passes):
        block, which = divmod(reading, order.passes)
        part = ids[reading * n : (reading + 1) * n]
        assert sorted(part.tolist()) == list(range(block * n, (block + 1) * n))
        assert (passes[reading * n : (reading + 1) * n] == which).all()


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_step_are_those_of_its_ids(order):
    for step in range(40):
        blocks = np.unique(order.entries(step)[0] // order.block_samples).tolist()
        assert blocks == list(order.blocks_of(step)) == order.blocks_read(step)
        assert order.newest_block(step) == order.oldest_block(step) == min(blocks)
        assert order.num_blocks(step + 1) == max(blocks) + 1
    assert order.num_blocks(0) == 0


def test_golden_order():
    """The sequence of finished runs would change with these: never refresh them."""
    assert ORDERS[1].entries(0)[0].tolist() == [6, 10, 5, 2, 4, 11, 1, 3]
    assert ORDERS[1].entries(1000)[0].tolist() == [2672, 2666, 2675, 2671, 2664, 2673, 2666, 2674]
    spread = Order(seed=1, block_samples=12, passes=3, batch_size=8, spread=4)
    assert spread.entries(0)[0].tolist() == ORDERS[1].entries(0)[0].tolist()
    assert spread.entries(1000)[0].tolist() == [2663, 2682, 2674, 2656, 2679, 2668, 2659, 2677]


# -----------------------------------------------------------------------------------------------
# Passes spread over a window of blocks


@pytest.mark.parametrize("order", SPREAD, ids=name)
def test_every_pass_reads_every_sample_once(order):
    end = begin_of(order, SLOTS)
    ids, passes = order.entries_between(0, end)
    assert len(set(zip(ids.tolist(), passes.tolist(), strict=True))) == end
    assert passes.max() < order.passes
    step = -(-end // order.batch_size)
    assert order.newest_block(step) == SLOTS
    gone = order.oldest_block(step) * order.block_samples  # samples that may be gone by then
    counts = np.bincount(ids)
    assert (counts[:gone] == order.passes).all()
    assert gone >= (SLOTS - order.spread + 1) * order.block_samples


@pytest.mark.parametrize("order", SPREAD, ids=name)
def test_a_step_reads_blocks_of_its_window_and_later_steps_none_before_it(order):
    live = 1 + (order.passes - 1) * order.spread // order.passes
    later = 10**9
    for step in reversed(range(300)):
        read, blocks = order.blocks_read(step), order.blocks_of(step)
        later = min(later, read[0])
        assert set(read) <= set(blocks) and blocks[-1] == order.num_blocks(step + 1) - 1
        assert blocks[0] == order.oldest_block(step) <= later
        assert order.oldest_block(step) > order.newest_block(step) - live
        assert order.oldest_block(step) <= order.oldest_block(step + 1)


@pytest.mark.parametrize("order", SPREAD, ids=name)
def test_the_start_waits_for_no_more_than_before(order):
    """All passes of the first block come first, as without a spread, and no block is begun before
    two thirds of the entries that were before it then.
    """
    alone = Order(order.seed, order.block_samples, order.passes, order.batch_size)
    block_entries = order.block_samples * order.passes
    for one, other in zip(
        order.entries_between(0, block_entries),
        alone.entries_between(0, block_entries),
        strict=True,
    ):
        assert one.tolist() == other.tolist()
    ids, _ = order.entries_between(0, block_entries * SLOTS)
    blocks, first = np.unique(ids // order.block_samples, return_index=True)
    assert blocks.tolist() == list(range(len(blocks)))
    assert (first >= 2 / 3 * blocks * block_entries).all()
    assert SLOTS <= len(blocks) <= SLOTS + order.spread / 2  # so many more are made, and no more


def test_a_batch_has_as_many_samples_of_every_block_of_the_window():
    order = Order(seed=4, block_samples=72, passes=16, batch_size=24, spread=8)
    for step in range(1000, 1100):
        blocks, counts = np.unique(order.entries(step)[0] // 72, return_counts=True)
        assert np.ptp(blocks) == 7 and counts.tolist() == [3] * 8


@pytest.mark.parametrize("order", SPREAD, ids=name)
def test_how_far_the_newest_block_is_from_the_oldest(order):
    """The bounds hold at every entry, and no smaller ones would."""
    order = replace(order, batch_size=1)
    for apart in (7, 200):
        newest = [order.newest_block(entry) for entry in range(3000 + apart)]
        oldest = [order.oldest_block(entry) for entry in range(3000)]
        assert order.most_ahead(apart) == max(map(sub, newest[apart:], newest))
        assert order.most_blocks(apart) == max(map(sub, newest[apart:], oldest)) + 1


def test_one_pass_has_nothing_to_spread():
    for step in range(50):
        one, other = (Order(3, 6, 1, 4, spread).entries(step)[0] for spread in (1, 8))
        assert one.tolist() == other.tolist()


def test_a_late_step_is_found_at_once():
    order = Order(seed=1, block_samples=4096, passes=16, batch_size=512, spread=8)
    ids, _ = order.entries(10**9)
    assert set(ids // 4096) == set(order.blocks_read(10**9)) and len(order.blocks_read(10**9)) == 8


def test_passes_and_blocks_are_shuffled_differently():
    order = Order(seed=1, block_samples=100, passes=2, batch_size=100)
    first, second, third = (order.entries(step)[0] for step in range(3))
    assert first.tolist() != second.tolist() and first.tolist() != (third - 100).tolist()
    assert first.tolist() != sorted(first.tolist())
