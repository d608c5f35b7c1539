"""The stream shows every sample the planned number of times, whatever the ranks."""

import numpy as np
import pytest

from distill.data.order import Order

ORDERS = [
    Order(seed=1, block_samples=12, passes=3, batch_size=12),
    Order(seed=1, block_samples=12, passes=3, batch_size=8),  # spans passes and blocks
    Order(seed=2, block_samples=4, passes=1, batch_size=10),  # spans several blocks at once
    Order(seed=3, block_samples=30, passes=2, batch_size=7),
]


@pytest.mark.parametrize("order", ORDERS)
def test_every_block_is_read_whole_and_in_turn(order):
    num_blocks = 7
    steps = num_blocks * order.block_entries // order.batch_size
    batches = [order.entries(step) for step in range(steps + 1)]
    ids = np.concatenate([b[0] for b in batches])[: num_blocks * order.block_entries]
    passes = np.concatenate([b[1] for b in batches])[: num_blocks * order.block_entries]
    n = order.block_samples
    for reading in range(num_blocks * order.passes):
        block, which = divmod(reading, order.passes)
        part = ids[reading * n : (reading + 1) * n]
        assert sorted(part.tolist()) == list(range(block * n, (block + 1) * n))
        assert (passes[reading * n : (reading + 1) * n] == which).all()


def test_passes_and_blocks_are_shuffled_differently():
    order = Order(seed=1, block_samples=100, passes=2, batch_size=100)
    first, second, third = (order.entries(step)[0] for step in range(3))
    assert first.tolist() != second.tolist() and first.tolist() != (third - 100).tolist()
    assert first.tolist() != sorted(first.tolist())


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_step_are_those_of_its_ids(order):
    for step in range(40):
        blocks = set((order.entries(step)[0] // order.block_samples).tolist())
        assert blocks == set(order.blocks_of(step))
        assert order.block_of(step) == min(blocks)
        assert order.num_blocks(step + 1) == max(blocks) + 1
    assert order.num_blocks(0) == 0


def test_golden_order():
    """The sequence of finished runs would change with these: never refresh them."""
    assert ORDERS[1].entries(0)[0].tolist() == [6, 10, 5, 2, 4, 11, 1, 3]
    assert ORDERS[1].entries(1000)[0].tolist() == [2672, 2666, 2675, 2671, 2664, 2673, 2666, 2674]
