"""The stream is a function of the step: not of ranks, restarts, or when shards come."""

import errno
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.config import ConfigError, ImageSpec
from distill.data import stream as stream_module
from distill.data.config import TrajectoryConfig
from distill.data.order import Order
from distill.data.sidecar import CorruptShard, ForeignShard, ShardSpec, shard_spec
from distill.data.stores.store import committed
from distill.data.stream import StreamError, TrajectoryStream
from distill.flow.noise import sample_noise
from distill.run import files
from distill.run.files import RunDir
from distill.teachers.config import NativeConfig
from distill.testing import tiny_shard, tiny_spec, write_tiny_shards

BLOCK_SHARDS, PASSES, BATCH = 3, 2, 12


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(stream_module, "POLL_S", 0.01)


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def order_of(spec: ShardSpec, batch_size: int = BATCH, passes: int = PASSES, spread: int = 1):
    block_samples = BLOCK_SHARDS * spec.samples_per_shard
    return Order(spec.seed, block_samples, passes, batch_size, spread)


def open_stream(
    run,
    spec,
    rank=0,
    world_size=1,
    timeout_s=30.0,
    should_stop=lambda: False,
    weights=None,
    **order,
):
    trajectory = TrajectoryConfig(wait_timeout_s=timeout_s)
    order = order_of(spec, **order)
    weights = weights or [[0.25, 0.75]]
    return TrajectoryStream(run, spec, trajectory, order, rank, world_size, weights, should_stop)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("batch_size", "passes", "spread"), [(12, 2, 1), (60, 2, 1), (12, 4, 4), (60, 3, 2)]
)
def test_global_batches_do_not_depend_on_the_ranks(run, world_size, batch_size, passes, spread):
    """Interleaving the ranks' parts gives the planned sequence with the right content."""
    spec = tiny_spec()  # blocks of 12 samples: a batch of 60 spans several passes and blocks
    write_tiny_shards(run, spec, range(12))
    order = order_of(spec, batch_size, passes, spread)
    made = [tiny_shard(spec, shard) for shard in range(12)]
    states = torch.cat([shard.states for shard in made]).half().float()
    labels = torch.from_numpy(np.concatenate([shard.labels for shard in made]))
    streams = [
        open_stream(run, spec, r, world_size, batch_size=batch_size, passes=passes, spread=spread)
        for r in range(world_size)
    ]
    for step in range(96 // batch_size):
        parts = [stream.read(step) for stream in streams]
        ids = torch.stack([part.ids for part in parts], dim=1).reshape(-1)
        positions = torch.stack([part.positions for part in parts], dim=1).reshape(-1)
        assert np.array_equal(ids.numpy(), order.entries(step)[0])
        assert positions.tolist() == list(range(batch_size))
        for part in parts:
            part.check()
            assert part.global_size == batch_size and part.states.dtype == torch.float32
            assert torch.equal(part.states, states[part.ids])
            assert torch.equal(part.condition, labels[part.ids])
            assert part.times.tolist() == [0.0, 0.5, 1.0]
            assert torch.equal(part.weights, torch.tensor([[0.25, 0.75]]).expand(len(part.ids), -1))


def test_each_sample_has_the_weights_of_its_class(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(3))
    table = [[label / 10, 1 - label / 10] for label in range(10)]
    batch = open_stream(run, spec, weights=table).read(0)
    assert len(set(batch.condition.tolist())) > 3
    assert torch.equal(batch.weights, torch.tensor(table)[batch.condition])


@pytest.mark.parametrize("spread", [1, 3])
def test_a_new_stream_at_any_step_continues_exactly(run, spread):
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(18))
    uninterrupted = open_stream(run, spec, spread=spread)
    for step in range(8):
        expected = uninterrupted.read(step)
        resumed = open_stream(run, spec, spread=spread).read(step)
        assert torch.equal(expected.ids, resumed.ids)
        assert torch.equal(expected.states, resumed.states)
    again = uninterrupted.read(1)  # also back in time, as after a fall-back to an older checkpoint
    assert torch.equal(again.states, open_stream(run, spec, spread=spread).read(1).states)


def test_noise_that_is_not_stored_is_made_again_in_float32(run):
    spec = tiny_spec(store_noise=False)
    write_tiny_shards(run, spec, range(3))
    batch = open_stream(run, spec).read(0)
    noise = torch.from_numpy(sample_noise(spec.seed, batch.ids.numpy(), spec.image))
    for teacher in range(2):
        assert torch.equal(batch.states[:, teacher, 0], noise)
    made = torch.cat([tiny_shard(spec, shard).states for shard in range(3)])
    assert torch.equal(batch.states[:, :, 1:], made[batch.ids][:, :, 1:].half().float())


@pytest.mark.parametrize("store_noise", [True, False])
def test_a_batch_has_the_times_of_the_stored_points(run, store_noise):
    trajectory = TrajectoryConfig(grid=4, store_points=[0, 3, 4], store_noise=store_noise)
    teachers = {"only": NativeConfig(path="-", solver="euler", steps=4)}
    spec = shard_spec(3, ImageSpec(1, 2, 10), trajectory, teachers, {"only": 64 * "0"})
    spec = replace(spec, samples_per_shard=4)
    assert spec.sample_shape == (1, 3 if store_noise else 2, 1, 2, 2)
    write_tiny_shards(run, spec, range(3))
    batch = open_stream(run, spec, weights=[[1.0]]).read(0)
    batch.check()
    assert batch.times.tolist() == [0.0, 0.75, 1.0]
    made = torch.cat([tiny_shard(spec, shard).states for shard in range(3)])[batch.ids]
    torch.testing.assert_close(batch.states, made, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("store_noise", [True, False])
def test_velocities_come_with_the_batch_where_they_are_stored(run, store_noise):
    spec = tiny_spec(store_noise=store_noise, store_velocity=True)
    write_tiny_shards(run, spec, range(3))
    batch = open_stream(run, spec).read(0)
    batch.check()
    made = [tiny_shard(spec, shard) for shard in range(3)]
    velocities = torch.cat([shard.velocities for shard in made])[batch.ids]
    assert torch.equal(batch.velocities, velocities.half().float())
    states = torch.cat([shard.states for shard in made])[batch.ids]
    torch.testing.assert_close(batch.states, states, rtol=1e-3, atol=1e-3)
    parts = batch.split(2)
    assert torch.equal(torch.cat([part.velocities for part in parts]), batch.velocities)


def test_bfloat16_states_come_back_as_they_were_rounded(run):
    spec = tiny_spec(dtype="bfloat16")
    write_tiny_shards(run, spec, range(3))
    batch = open_stream(run, spec).read(0)
    made = torch.cat([tiny_shard(spec, shard).states for shard in range(3)])[batch.ids]
    assert batch.states.dtype == torch.float32
    assert torch.equal(batch.states, made.bfloat16().float())


def test_reader_waits_for_missing_shards_and_says_so(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0, 2])
    stream, read = open_stream(run, spec), []
    thread = threading.Thread(target=lambda: read.append(stream.read(0)))
    thread.start()
    deadline = time.monotonic() + 10
    while stream.waiting_for != "block 0: shard 1 is not there yet":
        assert time.monotonic() < deadline, stream.waiting_for
        time.sleep(0.01)
    assert not read
    write_tiny_shards(run, spec, [1])
    thread.join(10)
    assert len(read) == 1 and stream.waiting_for == "" and 0 < stream.wait_s < 10


def test_the_next_block_is_loaded_while_this_one_is_read(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(6))
    stream = open_stream(run, spec)
    stream.read(0)
    stream._loading[1].join(10)
    for shard in range(6):
        run.tar(shard).unlink()
    waited = stream.wait_s
    for step in range(4):
        stream.read(step)
    assert stream.wait_s < waited + 1  # else it would wait for the files
    stream.close()


def test_the_next_batch_is_made_while_this_one_is_used(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(3))  # block 0: the steps 0 and 1
    stream = open_stream(run, spec)
    first = stream.read(0)
    step, ahead = stream._ahead
    assert step == 1 and stream.read(1) is ahead.result(10)
    assert stream._ahead is None  # of step 2 nothing is there
    write_tiny_shards(run, spec, range(3, 6))
    expected = open_stream(run, spec)
    for step in (2, 0, 1):  # what was made ahead is dropped when another step is asked for
        assert torch.equal(stream.read(step).states, expected.read(step).states)
    assert torch.equal(first.ids, expected.read(0).ids)
    stream.close()


def _answering(run, spec, monkeypatch, *answers):
    """A stream to whom each read of shard 4 answers so first, and the stream as it should be."""
    write_tiny_shards(run, spec, range(6))
    left, read_shard = list(answers), stream_module.shards.read_shard

    def read(run, spec, shard, *arrays):
        if shard == 4 and run.root.name != "good" and left:
            raise left.pop(0)
        return read_shard(run, spec, shard, *arrays)

    monkeypatch.setattr(stream_module.shards, "read_shard", read)
    good = RunDir(run.root.parent / "good")
    write_tiny_shards(good, spec, range(6))
    return left, open_stream(run, spec), open_stream(good, spec)


@pytest.mark.parametrize(
    "answer",
    [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "i/o"), CorruptShard("cut short")],
    ids=["ESTALE", "EIO", "half"],
)
def test_a_read_that_a_shared_file_system_answers_badly_once_is_made_again(
    run, monkeypatch, answer
):
    left, stream, expected = _answering(run, tiny_spec(), monkeypatch, answer)
    for step in range(4):
        assert torch.equal(stream.read(step).states, expected.read(step).states)
    assert left == [] and not run.quarantine.exists()
    stream.close()
    expected.close()


def test_a_file_server_that_is_away_is_waited_for_as_a_shard_is(run, monkeypatch):
    monkeypatch.setattr(files, "PAUSES_S", (0.01,))
    away = [OSError(errno.ESTALE, "Stale file handle")] * 40
    left, stream, expected = _answering(run, tiny_spec(), monkeypatch, *away)
    stream.read(0)
    while stream._loading[1].doing != "shard 4 cannot be read (Stale file handle)":
        assert stream._loading[1].is_alive()
    for step in range(4):
        assert torch.equal(stream.read(step).states, expected.read(step).states)
    assert left == []
    stream.close()
    expected.close()


def test_what_ended_the_loading_ahead_is_tried_again_when_the_block_is_needed(run, monkeypatch):
    error = OSError(errno.EACCES, "Permission denied")
    left, stream, expected = _answering(run, tiny_spec(), monkeypatch, error)
    stream.read(0)
    stream._loading[1].join(10)
    assert left == [] and stream._loading[1].has_failed
    for step in range(4):
        assert torch.equal(stream.read(step).states, expected.read(step).states)
    stream.close()
    expected.close()


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_no_more_than_one_block_is_loaded_ahead_and_each_once(run, spread, monkeypatch):
    """Of the others as many are held as the passes are spread over, until the last pass."""
    spec, read = tiny_spec(), []
    write_tiny_shards(run, spec, range(30))
    read_shard = stream_module.shards.read_shard
    monkeypatch.setattr(
        stream_module.shards, "read_shard", lambda *args: read.append(args[2]) or read_shard(*args)
    )
    order = order_of(spec, passes=4, spread=spread)
    stream = open_stream(run, spec, passes=4, spread=spread)
    for step in range(28):
        stream.read(step)
        assert sorted(stream._loading) == [*order.blocks_of(step), order.num_blocks(step + 1)]
        assert len(stream._loading) <= spread + 1  # a batch is a pass here, and ends with it
    for loading in stream._loading.values():
        loading.join(10)
    assert sorted(read) == [shard for shard in range(BLOCK_SHARDS * (max(stream._loading) + 1))]
    stream.close()


def test_a_wait_without_an_end_fails_loudly(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    with pytest.raises(StreamError, match=r"no shard came for 0 s; waited for block 0: shard 1"):
        open_stream(run, spec, timeout_s=0.2).read(0)


def test_a_stop_ends_a_wait_and_no_batch_that_is_there(run):
    spec, told = tiny_spec(), threading.Event()
    write_tiny_shards(run, spec, [0, 2])

    def should_stop():
        if stream.waiting_for == "block 0: shard 1 is not there yet":
            told.set()
        return told.is_set()

    stream = open_stream(run, spec, should_stop=should_stop)
    assert stream.read(0) is None and told.is_set()
    write_tiny_shards(run, spec, [1])
    while (batch := stream.read(0)) is None:  # the shard may not be in memory yet
        pass
    assert len(batch.ids) == BATCH
    assert len(stream.read(1).ids) == BATCH  # of the same block


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_bad_shard_is_set_aside_made_again_and_then_read(run, damage):
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(3))
    content = bytearray(run.tar(1).read_bytes())
    content[2000] ^= 1
    run.tar(1).write_bytes(content if damage == "flip" else content[:3072])
    expected = open_stream(RunDir(run.root.parent / "good"), spec)
    write_tiny_shards(RunDir(run.root.parent / "good"), spec, range(3))

    streams, read = [open_stream(run, spec, rank, 2) for rank in range(2)], {}
    threads = [
        threading.Thread(target=lambda r=r: read.update({r: streams[r].read(0)})) for r in range(2)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while 1 in committed(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write_tiny_shards(run, spec, [1])  # the coordinator sees it missing and leases it again
    for thread in threads:
        thread.join(10)
    states = torch.stack([read[0].states, read[1].states], dim=1).flatten(0, 1)
    assert torch.equal(states, expected.read(0).states)
    assert len(list(run.quarantine.iterdir())) == 1 and 1 in committed(run)


def test_shards_of_another_grid_are_refused_not_set_aside(run):
    write_tiny_shards(run, tiny_spec(grid=4), range(3))
    with pytest.raises(ForeignShard, match="times"):
        open_stream(run, tiny_spec(grid=2)).read(0)
    assert committed(run).keys() == {0, 1, 2} and not run.quarantine.exists()


def test_ranks_must_divide_the_batch(run):
    with pytest.raises(ConfigError, match="12 must be a multiple of the 5 ranks"):
        open_stream(run, tiny_spec(), 0, 5)


def test_a_loader_that_dies_does_not_hang_the_reader(run, monkeypatch):
    write_tiny_shards(run, tiny_spec(), range(3))

    def broken(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(stream_module.shards, "read_shard", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(StreamError, match="block-0 could not be loaded"):
        open_stream(run, tiny_spec()).read(0)
