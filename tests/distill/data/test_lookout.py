"""One process of a machine looks for shards; the others believe it for a while."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from distill.data import lookout
from distill.data.stores.local import LocalStore
from distill.run.files import RunDir
from distill.testing import tiny_spec, write_tiny_shards


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return RunDir(tmp_path / "run")


@pytest.fixture
def looks(monkeypatch) -> list[int]:
    """The shards that the file system was asked for."""
    asked, has = [], LocalStore.has
    monkeypatch.setattr(LocalStore, "has", lambda self, n: asked.append(n) or has(self, n))
    return asked


def test_many_ranks_ask_the_file_system_as_often_as_one(run, looks, monkeypatch):
    monkeypatch.setattr(lookout, "SHORTEST_S", 60.0)
    write_tiny_shards(run, tiny_spec(), [5])
    ranks = [lookout.Lookout(run) for _ in range(16)]
    looks.clear()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda rank: rank.found([4, 5]), ranks))
    assert found == [[5]] * 16
    assert looks == [4, 5]
    ranks[0].close()
    assert not list(run.root.parent.glob("bow-*"))


def test_an_answer_is_believed_for_a_pause_and_pauses_grow_until_a_shard_comes(run, looks):
    one = lookout.Lookout(run)
    pauses = []
    for _ in range(40):
        one.found([0])
        pauses.append(one.pause_s)
    assert pauses == sorted(pauses) and pauses[0] > lookout.SHORTEST_S
    assert pauses[-1] == lookout.LONGEST_S
    write_tiny_shards(run, tiny_spec(), [0])
    other = lookout.Lookout(run)  # it has only just begun to wait, and has no long pauses yet
    other.pause_s = 0.0
    assert other.found([0]) == [0] and other.pause_s == lookout.SHORTEST_S


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[1]", b'{"seen": {"0": []}}', b'{"seen": {"0": 3}}', b"[" * 99999]
)
def test_any_content_of_the_file_costs_a_look(run, looks, content):
    write_tiny_shards(run, tiny_spec(), [0])
    one = lookout.Lookout(run)
    one._path.write_bytes(content)
    assert one.found([0, 1]) == [0]


def test_where_nothing_can_be_written_every_process_looks(run, looks, monkeypatch):
    write_tiny_shards(run, tiny_spec(), [0])
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert lookout.Lookout(run).found([0, 1]) == [0]
