"""Shards in an object store: one commit per shard whatever races or dies, nothing bad is read.

Every test runs in fsspec's memory and on a server that speaks S3.
"""

import json
import threading
import uuid
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
import webdataset

from distill.config import ConfigError
from distill.data import stream as stream_module
from distill.data.config import TrajectoryConfig
from distill.data.layout import stored_dtype
from distill.data.order import Order
from distill.data.shards import read_shard, write_shard
from distill.data.sidecar import CorruptShard, ForeignShard, MisplacedShard
from distill.data.stores import bucket as object_store, bucket as shard_cache
from distill.data.stores.objects import Objects
from distill.data.stores.store import (
    committed,
    is_committed,
    open_store,
    read_sidecar,
    verify_shard,
)
from distill.data.stream import TrajectoryStream
from distill.export.fastgen import export_fastgen
from distill.report.cost import read_cost
from distill.run.files import RunDir
from distill.testing import (
    FaultInjector,
    tiny_shard,
    tiny_spec,
    write_tiny_record,
    write_tiny_shards,
)


@pytest.fixture(params=["memory", "s3"])
def run(request, tmp_path) -> RunDir:
    base = "memory://" if request.param == "memory" else request.getfixturevalue("bucket") + "/"
    return RunDir(tmp_path / "run", f"{base}{uuid.uuid4().hex}/run")


@pytest.fixture
def local(tmp_path) -> RunDir:
    return RunDir(tmp_path / "local")


def objects(run) -> Objects:
    return Objects(run.location)


def names(run) -> list[str]:
    """Everything that lies there, with x for what only its producer knows."""
    found = (name.split(".") for name in objects(run).sizes())
    return sorted(".".join([parts[0], *("x" for _ in parts[2:]), parts[-1]]) for parts in found)


def read(run, spec, shard):
    """(states, labels) as stored."""
    states = np.empty((spec.samples_per_shard, *spec.sample_shape), dtype=stored_dtype(spec))
    labels = np.empty(spec.samples_per_shard, dtype=np.int64)
    read_shard(run, spec, shard, states, labels)
    return states, labels


def damage(run, shard):
    """Flips a byte of a shard's tar in the store."""
    name = read_sidecar(run, shard).tar_name
    content = bytearray(objects(run).read(name))
    content[2000] ^= 1
    objects(run).write(name, bytes(content))


# -----------------------------------------------------------------------------------------------
# Round trip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_tar_is_that_of_a_local_folder(run, local, dtype, tmp_path):
    spec = tiny_spec(dtype=dtype)
    made = tiny_shard(spec, 5)
    sidecar = write_shard(run, spec, 5, made, 1.5, "test")
    write_shard(local, spec, 5, made, 1.5, "test")
    content = objects(run).read(sidecar.tar)
    assert content == local.tar(5).read_bytes()
    assert verify_shard(run, 5) == read_sidecar(run, 5) == sidecar
    assert json.loads(objects(run).read("00000005.json"))["tar"] == sidecar.tar
    assert committed(run) == committed(local) and is_committed(run, 5) and not is_committed(run, 4)
    states, labels = read(run, spec, 5)
    assert np.array_equal(states, read(local, spec, 5)[0])
    assert np.array_equal(labels, made.labels)
    (tmp_path / "copy.tar").write_bytes(content)
    plain = webdataset.WebDataset(str(tmp_path / "copy.tar"), shardshuffle=False)
    assert len(list(plain)) == spec.samples_per_shard
    assert names(run) == ["00000005.json", "00000005.x.tar"]


def test_a_place_where_nothing_was_put_is_empty(run):
    listing = open_store(run).listing()
    assert (listing.committed, listing.orphans, listing.without_tar) == ({}, (), ())
    assert open_store(run).reasons() == {} and open_store(run).clear() == []
    with pytest.raises(FileNotFoundError):
        read_sidecar(run, 0)


def test_batches_cost_and_export_are_those_of_a_local_folder(run, local):
    spec, order = tiny_spec(), Order(3, 3 * 4, 2, 12)
    for place in (run, local):
        write_tiny_shards(place, spec, range(6))
        write_tiny_record(place, {"data": {"num_classes": 10}})
    trajectory = TrajectoryConfig(wait_timeout_s=30.0)
    streams = [
        TrajectoryStream(place, spec, trajectory, order, 1, 2, [[0.5, 0.5]], lambda: False)
        for place in (run, local)
    ]
    for step in range(4):
        ours, theirs = (stream.read(step) for stream in streams)
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.states, theirs.states)
        assert torch.equal(ours.condition, theirs.condition)
    assert read_cost(run) == read_cost(local)
    ours, theirs = (export_fastgen(place, place.root / "fastgen") for place in (run, local))
    for path in theirs.glob("*.tar"):
        assert (ours / path.name).read_bytes() == path.read_bytes()


def test_a_list_of_several_pages_is_read_whole(bucket):
    place = Objects(f"{bucket}/{uuid.uuid4().hex}")
    for number in range(12):
        place.write(f"{number:08d}.json", b"x")
    client = boto3.client("s3", region_name="us-east-1")
    prefix = place.url.removeprefix("s3://bowstring/")
    page = client.list_objects_v2(Bucket="bowstring", Prefix=prefix)
    assert page["IsTruncated"] and page["KeyCount"] == 5  # tests/conftest.py asks the server for it
    assert place.sizes() == {f"{number:08d}.json": 1 for number in range(12)}


# -----------------------------------------------------------------------------------------------
# Commit


def test_second_to_finish_drops_its_own(run):
    spec = tiny_spec()
    first = write_shard(run, spec, 0, tiny_shard(spec, 0), 1.0, "first")
    other = tiny_shard(spec, 0)
    other.states[0, 0, 1] += 1  # as rounding on other hardware would
    assert write_shard(run, spec, 0, other, 2.0, "second") == first
    assert names(run) == ["00000000.json", "00000000.x.tar"]


def test_of_producers_that_finish_together_one_stands_and_is_whole(run):
    """Everyone has seen a free place and put a tar before anyone puts a sidecar."""
    spec, count = tiny_spec(), 4
    together, stands = threading.Barrier(count), []

    class Slow(Objects):
        def upload(self, path, name):
            super().upload(path, name)
            together.wait(30)

    def produce(number):
        store = object_store.ObjectStore(run)
        store._objects = Slow(run.location)
        made = tiny_shard(spec, 0)
        made.states[0, 0, 1] += number
        alone = RunDir(run.root / str(number))
        sidecar = write_shard(alone, spec, 0, made, 1.0, f"producer {number}")
        stands.append(store.publish(sidecar, alone.tar(0)))

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stands) == count
    standing = verify_shard(run, 0)
    if run.location.startswith("s3"):  # it knows create-if-absent
        assert stands == [standing] * count
        assert names(run) == ["00000000.json", "00000000.x.tar"]


def test_a_kill_between_tar_and_sidecar_commits_nothing(run, monkeypatch):
    spec = tiny_spec()
    with monkeypatch.context() as patch:
        fault = FaultInjector(Objects.create, 0, KeyboardInterrupt())
        patch.setattr(Objects, "create", lambda *args: fault(*args))
        with pytest.raises(KeyboardInterrupt):
            write_tiny_shards(run, spec, [0])
    assert fault.count == 1 and committed(run) == {} and not is_committed(run, 0)
    assert names(run) == ["00000000.x.tar"]
    write_tiny_shards(run, spec, [0])
    verify_shard(run, 0)
    assert len(open_store(run).listing().orphans) == 1
    assert open_store(run).clear() == []  # its producer may be at work
    monkeypatch.setattr(object_store.files, "STALE_S", -60.0)
    assert len(open_store(run).clear()) == 1
    verify_shard(run, 0)
    assert names(run) == ["00000000.json", "00000000.x.tar"]


def test_an_answer_that_was_lost_does_not_cost_the_shard(run, monkeypatch):
    """The sidecar was put, but the client hears of an error, or tries again and is refused."""
    create = Objects.create

    def lose(self, name, content):
        create(self, name, content)
        raise FileExistsError("At least one of the pre-conditions did not hold")

    monkeypatch.setattr(Objects, "create", lose)
    sidecar = write_shard(run, tiny_spec(), 0, tiny_shard(tiny_spec(), 0), 1.0, "test")
    assert verify_shard(run, 0) == sidecar


def test_a_sidecar_that_cannot_be_put_is_an_error(run, monkeypatch):
    fault = FaultInjector(Objects.create, 0, OSError("503 slow down"))
    monkeypatch.setattr(Objects, "create", lambda *args: fault(*args))
    with pytest.raises(OSError, match=r"shard 0 .* could not be written to .*: 503 slow down"):
        write_tiny_shards(run, tiny_spec(), [0])
    write_tiny_shards(run, tiny_spec(), [0])
    verify_shard(run, 0)


@pytest.mark.parametrize("what", ["tar missing", "tar short", "sidecar torn"])
def test_a_commit_that_cannot_be_right_does_not_block_its_place(run, what):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    tar = read_sidecar(run, 0).tar_name
    if what == "tar missing":
        objects(run).remove(tar)
    elif what == "tar short":
        objects(run).write(tar, b"short")
    else:
        objects(run).write("00000000.json", b'{"format": 1')
        assert committed(run).keys() == {0}  # a reader will find it
    write_tiny_shards(run, spec, [0])
    verify_shard(run, 0)
    assert len(open_store(run).reasons()) == 1


def test_a_shard_of_another_run_is_refused_and_left(run):
    write_tiny_shards(run, tiny_spec(grid=2), [0])
    before = read_sidecar(run, 0)
    with pytest.raises(ForeignShard, match="made for another run"):
        read(run, tiny_spec(grid=4), 0)
    with pytest.raises(ForeignShard, match="made for another run"):
        write_tiny_shards(run, tiny_spec(grid=4), [0])
    assert verify_shard(run, 0) == before and open_store(run).reasons() == {}


def test_a_sidecar_of_another_shard_is_corrupt(run):
    write_tiny_shards(run, tiny_spec(), [0])
    objects(run).write("00000004.json", objects(run).read("00000000.json"))
    with pytest.raises(MisplacedShard, match="shard 0"):
        verify_shard(run, 4)


# -----------------------------------------------------------------------------------------------
# Damage


def test_a_flipped_byte_is_found(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    damage(run, 0)
    with pytest.raises(CorruptShard, match="sha256 differs"):
        verify_shard(run, 0)
    with pytest.raises(CorruptShard, match="sha256 differs"):
        read(run, spec, 0)
    assert not list(run.cache.glob("*.tar"))


def test_a_bad_shard_is_set_aside_and_the_good_one_is_read(run, monkeypatch):
    monkeypatch.setattr(stream_module, "POLL_S", 0.01)
    monkeypatch.setattr(object_store.ObjectStore, "pause_s", 0.01)
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(3))
    damage(run, 1)
    store = open_store(run)
    seen = store.mark(1)
    trajectory, order = TrajectoryConfig(wait_timeout_s=30.0), Order(3, 3 * 4, 2, 12)
    stream = TrajectoryStream(run, spec, trajectory, order, 0, 1, [[0.5, 0.5]], lambda: False)
    batches = []
    thread = threading.Thread(target=lambda: batches.append(stream.read(0)))
    thread.start()
    while 1 in committed(run):
        thread.join(0.01)
    write_tiny_shards(run, spec, [1])
    thread.join(30)
    made = torch.cat([tiny_shard(spec, shard).states for shard in range(3)])
    assert torch.equal(batches[0].states, made[batches[0].ids].half().float())
    ((folder, reason),) = store.reasons().items()
    assert folder.startswith("00000001-") and "sha256 differs" in json.loads(reason)["reason"]
    assert len(objects(run).sizes(f"quarantine/{folder}")) == 3  # reason, sidecar, tar
    assert names(run).count("00000001.x.tar") == 1
    # A slower reader that saw the same bad bytes must not set the new, good shard aside.
    assert store.quarantine(1, "sha256 differs", seen) is None
    verify_shard(run, 1)


# -----------------------------------------------------------------------------------------------
# Copies


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """Names of the tars that are downloaded."""
    found, plain = [], Objects.read

    def count(self, name, start=None, end=None):
        found.extend([name] if name.endswith(".tar") else [])
        return plain(self, name, start, end)

    monkeypatch.setattr(Objects, "read", count)
    return found


def test_a_shard_is_downloaded_once(run, downloads):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    sidecar = read_sidecar(run, 0)
    first, _ = read(run, spec, 0)
    again, _ = read(run, spec, 0)
    assert np.array_equal(first, again)
    assert downloads == [sidecar.tar]
    verify_shard(run, 0)  # proves what lies in the store, not the copy
    assert len(downloads) == 2


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_copy_is_replaced_and_nobody_is_blamed(run, downloads, cut):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    sidecar, (states, _) = read_sidecar(run, 0), read(run, spec, 0)
    copy = run.cache / sidecar.tar
    content = bytearray(copy.read_bytes())
    content[2000] ^= 1
    copy.write_bytes(content[:4000] if cut else content)
    assert np.array_equal(read(run, spec, 0)[0], states)
    assert downloads == [sidecar.tar] * 2 and open_store(run).reasons() == {}


def test_copies_are_bounded(run, monkeypatch, downloads):
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(4))
    assert not run.root.exists()  # who makes shards needs no folder of the run
    run.cache.mkdir(parents=True)
    (run.cache / ".00000009.tar.tmp-0123abcd").write_bytes(b"of a reader that was killed")
    size = committed(run)[0]
    monkeypatch.setattr(shard_cache, "CACHE_BYTES", 2 * size)
    for shard in (0, 1, 0, 2, 0, 3):  # 0 is read again and again, so it stays
        read(run, spec, shard)
    assert sum(path.stat().st_size for path in run.cache.iterdir()) == 2 * size
    assert len(downloads) == 4


# -----------------------------------------------------------------------------------------------
# Room, names


def test_evicted_shards_keep_their_sidecars(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, range(3))
    sidecars = list(open_store(run).sidecars())
    tar = read_sidecar(run, 0).tar
    objects(run).write("00000000.0123456789abcdef.tar", b"of a producer that was killed")
    open_store(run).delete_tars((0, 1))
    assert committed(run).keys() == {2} and open_store(run).listing().without_tar == (0, 1)
    assert list(open_store(run).sidecars()) == sidecars and len(sidecars) == 3
    # A tar that comes late does not bring the shard back, neither here nor for who looks first.
    objects(run).write("00000000.0123456789abcdef.tar", b"of a producer believed dead")
    for store in (open_store(run), object_store.ObjectStore(run)):
        assert store.listing().committed.keys() == {2} and not store.has(0)
    assert tar != "00000000.0123456789abcdef.tar"


@pytest.mark.parametrize(
    "location",
    ["s3://name:hunter2@bucket/run", "s3://hunter2@bucket/run", "s3://bucket/run?secret=hunter2"],
)
def test_credentials_in_a_location_are_refused_and_not_repeated(location):
    with pytest.raises(ConfigError, match=r"trajectory\.location=s3://\.\.\. .* environment") as e:
        TrajectoryConfig(location=location)
    assert "hunter2" not in str(e.value)


@pytest.mark.parametrize("location", ["file:///data/shards", "s3://bucket/run[1]"])
def test_a_location_that_would_be_misread_is_refused(location):
    with pytest.raises(ConfigError, match=r"trajectory\.location="):
        TrajectoryConfig(location=location)


def test_an_unknown_kind_of_store_is_named():
    with pytest.raises(ConfigError, match=r"trajectory\.location=floppy://a cannot be opened"):
        open_store(RunDir(Path("run"), "floppy://a"))


def test_a_folder_elsewhere_is_a_local_store(tmp_path):
    run = RunDir(tmp_path / "run", str(tmp_path / "elsewhere"))
    write_tiny_shards(run, tiny_spec(), [0])
    verify_shard(run, 0)
    assert (tmp_path / "elsewhere" / "00000000.tar").exists() and not run.root.exists()
