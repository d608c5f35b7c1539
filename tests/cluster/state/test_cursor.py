"""The trainer's position on disk: when it is written, and what a bad disk does to it."""

import time

import pytest

from cluster.state import cursor as cursor_module
from cluster.state.cursor import WithCursor, read_cursor
from distill.data.order import Order
from distill.run.dir import RunDir
from distill.run.files import write_json

ORDER = Order(0, 8, 1, 4)  # seed, samples of a block, passes, batch: two steps a block


class Source:
    """A stream that never waits, unless it is told for what."""

    wait_s, waiting_for = 0.0, ""

    def read(self, step):
        return step


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(cursor_module, "PERIOD_S", 0.01)


def soon(run, expected):
    deadline = time.monotonic() + 10
    while read_cursor(run) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return read_cursor(run) == expected


def test_the_block_that_is_read_and_the_reason_of_a_wait_are_written(tmp_path):
    run, source = RunDir(tmp_path), Source()
    stream = WithCursor(source, ORDER, run, rank=0)
    assert stream.read(0) == 0 and soon(run, (0, ""))
    stream.read(5)
    assert soon(run, (2, ""))
    source.waiting_for = "block 3: shard 6 is not there yet"
    assert soon(run, (2, source.waiting_for))


def test_a_trainer_that_starts_again_does_not_call_the_teachers_back(tmp_path):
    """Until it reads, the position of the training before it stands."""
    run = RunDir(tmp_path)
    write_json(run.cursor, {"block": 7, "waiting_for": ""})
    stream = WithCursor(Source(), ORDER, run, rank=0)
    time.sleep(0.1)
    assert read_cursor(run) == (7, "")
    stream.read(14)
    time.sleep(0.1)
    assert read_cursor(run) == (7, "")
    stream.read(16)
    assert soon(run, (8, ""))


def test_a_disk_that_is_full_for_a_while_does_not_stop_the_cursor(tmp_path, monkeypatch):
    """Teachers follow it: a cursor that stood still would end the production."""
    run, refused = RunDir(tmp_path), []

    def refuse(path, value):
        refused.append(value)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cursor_module, "write_json", refuse)
    WithCursor(Source(), ORDER, run, rank=0).read(4)
    deadline = time.monotonic() + 10
    while len(refused) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    monkeypatch.setattr(cursor_module, "write_json", write_json)
    assert len(refused) >= 2 and soon(run, (2, ""))


def test_other_ranks_write_nothing(tmp_path):
    WithCursor(Source(), ORDER, RunDir(tmp_path), rank=1).read(4)
    time.sleep(0.1)
    assert not RunDir(tmp_path).cursor.exists()
