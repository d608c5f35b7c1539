"""The trainer's position on disk: when it is written, and what a bad disk does to it."""

import time

import pytest

from cluster.state.cursor import Position, read_cursor, write_cursor
from cluster.trainer import sources
from cluster.trainer.sources import Cursor, Source
from distill.data.order import Order
from distill.run.files import RunDir

ORDER = Order(0, 8, 1, 4)  # seed, samples of a block, passes, batch: two steps a block


class Steps:
    """A stream of the steps that are read. It never waits, unless it is told for what."""

    wait_s, waiting_for = 0.0, ""

    def read(self, step):
        return step


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(sources, "PERIOD_S", 0.01)


def source_in(run, stream=None, beat=lambda: None):
    stream = stream or Steps()
    return Source(stream, beat, Cursor(stream, ORDER, run))


def soon(run, expected):
    deadline = time.monotonic() + 10
    while read_cursor(run) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return read_cursor(run) == expected


def test_the_block_that_is_read_and_the_reason_of_a_wait_are_written(tmp_path):
    run, stream = RunDir(tmp_path), Steps()
    source = source_in(run, stream)
    assert source.read(0) == 0 and soon(run, Position(0, ""))
    source.read(5)
    assert soon(run, Position(2, ""))
    stream.waiting_for = "block 3: shard 6 is not there yet"
    assert soon(run, Position(2, stream.waiting_for))


def test_a_trainer_that_starts_again_does_not_call_the_teachers_back(tmp_path):
    """Until it reads, the position of the training before it stands."""
    run = RunDir(tmp_path)
    write_cursor(run, 7, "")
    source = source_in(run)
    time.sleep(0.1)
    assert read_cursor(run) == Position(7, "")
    source.read(14)
    time.sleep(0.1)
    assert read_cursor(run) == Position(7, "")
    source.read(16)
    assert soon(run, Position(8, ""))


def test_a_disk_that_is_full_for_a_while_does_not_stop_the_cursor(tmp_path, monkeypatch):
    """Teachers follow it: a cursor that stood still would end the production."""
    run, refused = RunDir(tmp_path), []

    def refuse(*cursor):
        refused.append(cursor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "write_cursor", refuse)
    source_in(run).read(4)
    deadline = time.monotonic() + 10
    while len(refused) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    monkeypatch.setattr(sources, "write_cursor", write_cursor)
    assert len(refused) >= 2 and soon(run, Position(2, ""))


def test_a_source_without_a_cursor_writes_nothing_and_every_source_beats_after_a_read(tmp_path):
    told = []

    class Slow(Steps):
        def read(self, step):
            told.append("read")
            return step

    assert Source(Slow(), lambda: told.append("beat")).read(4) == 4
    assert told == ["read", "beat"]
    time.sleep(0.1)
    assert not RunDir(tmp_path).cursor.exists()
