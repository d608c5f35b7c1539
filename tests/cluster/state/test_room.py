"""Deleting shards for room: what may go, what must fit, and what a kill in between leaves."""

import dataclasses

import pytest

from cluster.plan.stream import stream_order, stream_plan
from cluster.settings.hydra import compose
from cluster.state.done import view_of
from cluster.state.evicted import (
    OldestCheckpoint,
    evict,
    forget_evicted,
    oldest_verified,
    ranges_of,
    read_evicted,
    recorded,
)
from cluster.state.room import check_room, room_for_training
from distill.checkpoint.manifest import step_name
from distill.config import ConfigError
from distill.data.stores.store import committed
from distill.run.files import RunDir, read_lines
from distill.testing import tiny_spec, write_tiny_shards


def make_config(folder, steps=200, **trajectory):
    """Blocks of 2 shards, read in 4 steps; a checkpoint every 2 steps, 2 are kept."""
    (config,) = compose(["experiment=tiny", f"run.dir={folder}", f"train.max_steps={steps}"])
    return dataclasses.replace(
        config, trajectory=dataclasses.replace(config.trajectory, **trajectory)
    )


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    write_tiny_shards(run, tiny_spec(), range(6))
    return run


def test_evicted_shards_lose_their_bytes_and_keep_their_sidecars(run):
    evict(run, (0, 1), step=4)
    evict(run, (2,), step=8)
    found = committed(run)
    assert sorted(found) == [3, 4, 5] and read_evicted(run, found) == {0, 1, 2}
    assert [run.sidecar(n).exists() for n in range(3)] == [True] * 3
    assert [e["shards"] for e in read_lines(run.events) if e["kind"] == "evict"] == [[0, 1], [2]]


def test_a_kill_between_record_and_deletion_leaves_a_shard_that_is_there(run):
    content = run.tar(0).read_bytes()
    evict(run, (0, 1), step=4)
    run.tar(0).write_bytes(content)
    assert read_evicted(run, committed(run)) == {1}


def test_ranges_say_the_same_as_the_set():
    assert ranges_of({0, 1, 2, 5, 7, 8}) == ((0, 2), (5, 5), (7, 8))
    assert ranges_of(set()) == ()


def test_a_corrupt_record_is_refused_and_left(run):
    run.evicted.write_text('{"shards": [[0')
    with pytest.raises(ConfigError, match=r"evicted\.json is corrupt"):
        recorded(run)
    assert run.evicted.read_text() == '{"shards": [[0'


def test_the_oldest_checkpoint_that_verifies_decides(run, write_checkpoint):
    assert oldest_verified(run.checkpoints) == 0
    damaged = write_checkpoint(run, 2)
    write_checkpoint(run, 4)
    write_checkpoint(run, 6)
    assert oldest_verified(run.checkpoints) == 2
    (damaged / "rank_00000.safetensors").write_bytes(b"Weights")
    assert oldest_verified(run.checkpoints) == 4
    watch = OldestCheckpoint(run)
    assert watch.step == 0  # nothing is evicted before the first look has ended
    watch.look()
    watch._looking.join()
    assert watch.step == 4


def test_shards_are_made_again_when_the_checkpoint_behind_them_is_gone(run):
    evict(run, (0, 1, 2, 3), step=8)
    forget_evicted(run, 2)
    assert recorded(run) == {0, 1}
    assert [e["shards"] for e in read_lines(run.events) if e["kind"] == "make_again"] == [[2, 3]]


def test_a_run_without_checkpoints_makes_all_that_it_evicted_again(run, tmp_path, write_checkpoint):
    config = make_config(run.root)
    plan = stream_plan(config)
    config = make_config(run.root, max_bytes=20 * plan.shard_bytes)
    write_checkpoint(run, 8)
    evict(run, (0, 1), step=8)
    check_room(view_of(config), trainer_reads=True)
    assert recorded(run) == {0, 1}
    (run.checkpoints / step_name(8)).rename(tmp_path / "elsewhere")
    check_room(view_of(config), trainer_reads=True)
    assert recorded(run) == set()


def test_evicted_shards_count_as_made(run, tmp_path):
    config = make_config(run.root, steps=12)
    assert stream_plan(config).shards == 6 and view_of(config).has_all_shards
    evict(run, (0, 1), step=12)
    assert view_of(config).has_all_shards
    run.tar(2).unlink()
    assert not view_of(config).has_all_shards


# 2 checkpoints, each after 2 steps: 3 steps of 16 samples touch 2 blocks of 64 entries at most.
# With the 4 shards that are made ahead, 2 * 2 + 4 = 8 must fit.
@pytest.mark.parametrize(("fit", "is_enough"), [(8, True), (7, False)])
def test_a_run_that_could_stop_for_want_of_room_is_refused(fit, is_enough, run):
    plan = stream_plan(make_config(run.root))
    assert plan.shards == 100
    config = make_config(run.root, max_bytes=fit * plan.shard_bytes)
    if is_enough:
        check_room(view_of(config), trainer_reads=True)
    else:
        with pytest.raises(ConfigError, match=r"max_bytes=.* 8 shards .* lower train\.save_every"):
            check_room(view_of(config), trainer_reads=True)


def test_shards_made_without_training_must_all_fit(run, write_checkpoint):
    plan = stream_plan(make_config(run.root))
    config = make_config(run.root, max_bytes=99 * plan.shard_bytes)
    with pytest.raises(ConfigError, match=r"100 shards .* without training.*use `bowstring run`"):
        check_room(view_of(config), trainer_reads=False)
    write_checkpoint(run, 4)  # the first block is behind it
    check_room(view_of(config), trainer_reads=False)


def test_shards_that_are_there_and_still_needed_count(run, write_checkpoint):
    plan = stream_plan(make_config(run.root))
    write_tiny_shards(run, tiny_spec(), range(6, 12))
    config = make_config(run.root, max_bytes=10 * plan.shard_bytes)
    with pytest.raises(ConfigError, match="12 that are there and still needed"):
        check_room(view_of(config), trainer_reads=True)
    write_checkpoint(run, 8)  # four of them are behind it
    check_room(view_of(config), trainer_reads=True)


def test_checkpoints_kept_under_other_settings_need_their_room(tmp_path):
    config = make_config(tmp_path)
    order, trajectory, train = stream_order(config), config.trajectory, config.train
    assert room_for_training(order, trajectory, train, 1000, []).blocks == 2
    # From step 4, block 1, to step 41, block 10, until the save of step 42 drops it.
    assert room_for_training(order, trajectory, train, 1000, [4, 40]).blocks == 10


def test_passes_that_are_spread_need_room_for_their_window(tmp_path):
    """Of 8 passes over a window of 4 blocks, 4 blocks lie before the newest one, itself included.
    A block is 256 entries, so three steps of 16 reach one further.
    """
    config = make_config(tmp_path, passes=8, spread=4)
    order, trajectory, train = stream_order(config), config.trajectory, config.train
    assert room_for_training(order, trajectory, train, 1000, []).blocks == 4 + 1
    assert room_for_training(order, trajectory, train, 1000, [40, 150]).blocks == 9
