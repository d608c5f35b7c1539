"""The simulated cluster of benchmarks/stream/world.py: what must hold whatever its numbers are."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.stream.world import World
from benchmarks.stream.world_settings import SICKNESSES, WAYS, Settings
from cluster.pool.messages import Place

ROUNDS, TEACHERS = 12, 32
SMALL = Settings(
    teachers=TEACHERS,
    per_node=4,
    shard_s=100.0,
    spread=0.0,
    ready_ahead=3 * TEACHERS,
    block_shards=4,
    shards=ROUNDS * TEACHERS,
    first=0,
    last=ROUNDS * TEACHERS,
    samples_per_shard=2,
    passes=2,
    batch_size=8,
)


@pytest.mark.parametrize("headroom", [0.5, 0.8, 1.0, 1.1, 3.0])
def test_without_preemption_goodput_is_the_ratio_of_the_rates_and_at_most_one(headroom):
    """With h = teachers / need and shards that all take T, R rounds are read from T on:

    h >= 1: the trainer never waits. h < 1: round R is there at R T, and read in h T.
    """
    found = World(replace(SMALL, headroom=headroom)).run()
    h = min(1.0, headroom)
    assert found["goodput"] == pytest.approx(ROUNDS * h / (ROUNDS - 1 + h), rel=1e-9)
    assert (found["wasted"], found["expiries_per_hour"], found["teachers_up"]) == (0, 0, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("per_hour", [0.5, 4.0])
def test_whatever_is_taken_every_id_is_read_as_planned(way, per_hour):
    world = World(replace(SMALL, way=way, per_hour=per_hour, spread=0.6, rejoin_s=60.0))
    found = world.run()
    assert found["taken_per_hour"] > 0
    assert (found["expiries_per_hour"] > 0) == (way == "silent")
    assert (np.sort(world.reads) == SMALL.passes).all()
    assert world.coordinator.is_done


def test_passes_that_are_spread_are_read_as_planned_under_preemption():
    world = World(replace(SMALL, passes=4, block_spread=6, way="killed", per_hour=4.0, spread=0.6))
    assert world.run()["taken_per_hour"] > 0  # that every id was read as planned is asserted there
    assert (world.reads == 4).sum() > (world.reads < 4).sum() > 0


def test_notice_that_lasts_a_shard_wastes_nothing():
    lasting = replace(SMALL, per_hour=10.0, way="drained", notice_s=SMALL.shard_s)
    found = World(lasting).run()
    assert found["taken_per_hour"] > 0 and found["wasted"] == 0
    assert World(replace(lasting, notice_s=SMALL.shard_s / 2)).run()["wasted"] > 0


def test_the_window_bounds_what_lies_ahead_and_how_many_work():
    """Of shards that come in rounds of T, at most the window of w shards can be read in one T."""
    window = SMALL.block_shards + 8
    world = World(replace(SMALL, headroom=1.0, ready_ahead=8))
    found = world.run()
    assert found["goodput"] <= window / TEACHERS * ROUNDS / (ROUNDS - 1)
    assert found["backlog"] <= window


# A quarter of the usual world, so that the share of sick GPUs is that of 256 workers.
SICK = replace(
    Settings(), teachers=256, headroom=1.1, ready_ahead=2048, shards=12_288, first=2048, last=8192
)


@pytest.mark.parametrize("sick", [*((kind,) for kind in SICKNESSES), SICKNESSES], ids="+".join)
def test_three_sick_gpus_of_256_cost_no_shard_and_hardly_any_time(sick):
    """That no shard is given up is asserted there: a real run would end. With 18 of 256 gone there
    must be more to spare than with 3.
    """
    base = replace(SICK, headroom=1.1 if len(sick) == 1 else 1.2)
    world = World(replace(base, sick=sick))
    found, healthy = world.run(), World(base).run()
    assert found["goodput"] >= 0.98 * healthy["goodput"]
    assert found["excluded"] == 3 * len(sick)
    assert {place.gpu for place in world.excluded} == {"0"}


def test_sick_gpus_on_nodes_that_come_and_go_are_found_again():
    coming = replace(SICK, way="killed", per_hour=2.0, headroom=2.0, sick=("first", "dies"))
    world = World(coming)
    assert world.run()["taken_per_hour"] > 0
    assert world.excluded <= {Place(f"n{n}", "0") for n in range(6)}  # some are away
