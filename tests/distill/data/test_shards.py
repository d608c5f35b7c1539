"""A shard is committed whole or not at all; a bad byte is found; a foreign shard is refused."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from distill.data import sidecar as ledger
from distill.data.layout import stored_dtype
from distill.data.shards import as_tensor, read_shard, write_shard
from distill.data.sidecar import CorruptShard, ForeignShard, Sidecar
from distill.data.stores.store import committed, open_store, read_sidecar, verify_shard
from distill.run.files import RunDir, clean_temporaries, temporary_path
from distill.testing import FaultInjector, tiny_shard, tiny_spec, write_tiny_shards


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def read(run, spec, shard):
    """(states, labels) as stored."""
    states = np.empty((spec.samples_per_shard, *spec.sample_shape), dtype=stored_dtype(spec))
    labels = np.empty(spec.samples_per_shard, dtype=np.int64)
    read_shard(run, spec, shard, states, labels)
    return states, labels


def names(run) -> list[str]:
    """Everything in `shards/` but the lock."""
    return sorted(path.name for path in run.shards.iterdir() if path.name != ".lock")


# -----------------------------------------------------------------------------------------------
# Round trip and format


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("store_noise", [True, False])
def test_round_trip_is_bit_exact(run, dtype, store_noise):
    spec = tiny_spec(dtype=dtype, store_noise=store_noise)
    made = tiny_shard(spec, 5)
    sidecar = write_shard(run, spec, 5, made, 1.5, "test")
    states, labels = read(run, spec, 5)
    expected = made.states[:, :, 0 if store_noise else 1 :].to(getattr(torch, dtype))
    assert torch.equal(as_tensor(spec, states), expected) and np.array_equal(labels, made.labels)
    assert verify_shard(run, 5) == read_sidecar(run, 5) == sidecar
    assert names(run) == ["00000005.json", "00000005.tar"]
    assert committed(run) == {5: run.tar(5).stat().st_size}


@pytest.mark.parametrize("store_noise", [True, False])
def test_velocities_lie_behind_the_states_and_without_them_the_bytes_are_as_before(
    run, store_noise
):
    spec = tiny_spec(store_noise=store_noise)
    plain = write_shard(run, spec, 5, tiny_shard(spec, 5), 1.5, "test").to_bytes()
    assert b"store_velocity" not in plain  # so a shard of an older version reads the same
    spec = replace(spec, store_velocity=True)
    made = tiny_shard(spec, 6)
    sidecar = write_shard(run, spec, 6, made, 1.5, "test")
    assert read_sidecar(run, 6) == sidecar and sidecar.spec.store_velocity
    stored = as_tensor(spec, read(run, spec, 6)[0])
    assert torch.equal(stored[:, :, -3:], made.velocities.half())
    assert torch.equal(stored[:, :, :-3], made.states[:, :, -spec.num_states :].half())


def test_opens_with_plain_webdataset(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [2])
    made = tiny_shard(spec, 2)
    pipeline = webdataset.WebDataset(str(run.tar(2)), shardshuffle=False).decode()
    samples = list(pipeline)
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in made.ids]
    for index, sample in enumerate(samples):
        assert np.array_equal(sample["states.npy"], made.states[index].half().numpy())
        meta = {"id": int(made.ids[index]), "label": int(made.labels[index]), "dtype": "float16"}
        assert sample["meta.json"] == meta


def snippets(section: str) -> list[str]:
    """The Python blocks of a section of docs/formats.md."""
    text = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    part = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_five_lines_of_the_documentation_read_a_shard(run, dtype):
    spec = tiny_spec(dtype=dtype)
    write_tiny_shards(run, spec, [0])
    reader, bits = snippets("Shards")[:2]
    assert len([line for line in reader.splitlines() if line]) == 5
    # The lines of the page, run for every sample; the last one is for bfloat16.
    body = reader.rstrip() + "\n" + "".join(f"    {line}\n" for line in bits.splitlines())
    body += "    found.append((states, label))\n"
    found = []
    path = str(run.tar(0))
    exec(body.replace("runs/digits/shards/00000000.tar", path), {"found": found})
    made = tiny_shard(spec, 0)
    expected = made.states.to(getattr(torch, dtype)).float().numpy()
    assert [label for _, label in found] == made.labels.tolist()
    assert np.array_equal(np.stack([states for states, _ in found]).astype(np.float32), expected)


def test_bfloat16_holds_what_float16_cannot(run):
    spec, made = tiny_spec(dtype="bfloat16"), tiny_shard(tiny_spec(), 0)
    made.states[1, 0, 2] = 1e6
    write_shard(run, spec, 0, made, 1.0, "test")
    found = as_tensor(spec, read(run, spec, 0)[0])
    assert torch.equal(found, made.states.bfloat16()) and found[1, 0, 2].isfinite().all()


def test_sidecar_says_what_the_format_promises(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [1])
    tree = json.loads(run.sidecar(1).read_text())
    assert (tree["count"], tree["first_id"], tree["last_id"]) == (4, 4, 7)
    assert tree["spec"]["times"] == [0.0, 0.5, 1.0] and tree["spec"]["dtype"] == "float16"
    assert tree["spec"]["teachers"][1]["fingerprint"] == 64 * "1"
    assert (tree["nfe"], tree["seconds"], tree["producer"]) == (4, 1.5, "test")
    with tarfile.open(run.tar(1)) as tar:
        offsets = [m.offset_data for m in tar.getmembers() if m.name.endswith("states.npy")]
    assert tree["offsets"] == offsets


def test_two_producers_write_the_same_bytes(run, tmp_path):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [3])
    write_tiny_shards(RunDir(tmp_path / "other"), spec, [3])
    assert run.tar(3).read_bytes() == RunDir(tmp_path / "other").tar(3).read_bytes()


# -----------------------------------------------------------------------------------------------
# Commit


def test_second_to_finish_drops_its_own(run):
    spec = tiny_spec()
    first = write_shard(run, spec, 0, tiny_shard(spec, 0), 1.0, "first")
    before = run.tar(0).read_bytes()
    other = tiny_shard(spec, 0)
    other.states[0, 0, 1] += 1  # as rounding on other hardware would
    assert write_shard(run, spec, 0, other, 2.0, "second") == first
    assert run.tar(0).read_bytes() == before
    assert names(run) == ["00000000.json", "00000000.tar"]


@pytest.mark.parametrize("damage", ["same", "cut", "other"])
def test_orphan_tar_is_kept_if_equal_and_replaced_if_not(run, damage):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    run.sidecar(0).unlink()
    whole = run.tar(0).read_bytes()
    content = {"same": whole, "cut": whole[:700], "other": bytes(len(whole))}[damage]
    run.tar(0).write_bytes(content)
    inode = run.tar(0).stat().st_ino
    assert committed(run) == {}
    write_tiny_shards(run, spec, [0])
    verify_shard(run, 0)
    assert (run.tar(0).stat().st_ino == inode) == (damage == "same")


def test_works_without_hard_links(run, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    spec = tiny_spec()
    first = write_shard(run, spec, 0, tiny_shard(spec, 0), 1.0, "first")
    assert write_shard(run, spec, 0, tiny_shard(spec, 0), 2.0, "second") == first
    run.sidecar(0).unlink()
    write_tiny_shards(run, spec, [0])
    verify_shard(run, 0)
    assert names(run) == ["00000000.json", "00000000.tar"]


@pytest.mark.parametrize("damage", ["tar missing", "tar short", "sidecar torn"])
def test_a_commit_that_cannot_be_right_does_not_block_its_place(run, damage):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    if damage == "tar missing":
        run.tar(0).unlink()
    elif damage == "tar short":
        os.truncate(run.tar(0), 1000)
    else:
        os.truncate(run.sidecar(0), 100)
    write_tiny_shards(run, spec, [0])
    verify_shard(run, 0)
    assert len(list(run.quarantine.glob("*/00000000.json"))) == 1


def test_shard_of_another_run_is_refused_and_left(run):
    write_tiny_shards(run, tiny_spec(grid=2), [0])
    before = run.tar(0).read_bytes()
    other = tiny_spec(grid=4)
    sentence = r"times: \[0.0, 0.5, 1.0\] instead of \[0.0, 0.25, 0.5, 0.75, 1.0\]"
    with pytest.raises(ForeignShard, match=sentence):
        read(run, other, 0)
    with pytest.raises(ForeignShard, match=sentence):
        write_tiny_shards(run, other, [0])
    assert run.tar(0).read_bytes() == before and not run.quarantine.exists()


# Dies by SIGKILL at its n-th write, flush or link, for n = 1, 2, .. until it commits.
KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from distill.data import shards
from distill.run.files import RunDir
from distill.testing import tiny_spec, write_tiny_shards

count = 0

def deadly(function, at):
    def call(*args):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

status, at = 1, 0
while status != 0:
    at += 1
    if os.fork() == 0:
        shards._Sink.write = deadly(shards._Sink.write, at)
        os.fsync, os.link = deadly(os.fsync, at), deadly(os.link, at)
        write_tiny_shards(RunDir(Path(sys.argv[1]) / str(at)), tiny_spec(32), [0])
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print(status)
"""


def test_kill_9_anywhere_in_a_write_is_invisible(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert set(out[:-1]) == {str(-signal.SIGKILL)} and out[-1] == "0"
    assert len(out) >= 10  # several writes, two files flushed and linked, the folder flushed twice
    spec, seen = tiny_spec(32), set()
    expected = tiny_shard(spec, 0).states.half().numpy()
    for at in range(1, len(out)):
        run = RunDir(tmp_path / str(at))
        seen.add((bool(committed(run)), len(names(run))))
        if committed(run):
            verify_shard(run, 0)
        write_tiny_shards(run, spec, [0])
        assert np.array_equal(read(run, spec, 0)[0], expected)
        clean_temporaries(run.shards)
        assert names(run) == ["00000000.json", "00000000.tar"]
    # It died with a temporary tar alone, with a published tar beside it, and after the commit.
    assert {(False, 1), (False, 2), (False, 3), (True, 3)} <= seen


def test_temporaries_of_live_producers_stay(run):
    write_tiny_shards(run, tiny_spec(), [0])
    ours = temporary_path(run.tar(1))
    elsewhere = run.shards / ".00000001.tar.tmp-some-host-1-0123abcd"
    forgotten = run.shards / ".00000002.tar.tmp-some-host-1-0123abcd"
    for path in (ours, elsewhere, forgotten):
        path.touch()
    os.utime(forgotten, (0, 0))
    assert clean_temporaries(run.shards) == [forgotten]
    assert ours.exists() and elsewhere.exists()


# -----------------------------------------------------------------------------------------------
# Damage


def cut_points(run) -> dict[str, int]:
    """Lengths at which a cut tar still looks like a tar to some readers."""
    with tarfile.open(run.tar(0)) as tar:
        members = tar.getmembers()
    return {
        "member border": members[2].offset,
        "header": members[3].offset + 100,
        "data": members[3].offset_data + 50,
        "end": run.tar(0).stat().st_size - 1,
        "empty": 0,
    }


@pytest.mark.parametrize("where", ["member border", "header", "data", "end", "empty"])
def test_truncation_is_found(run, where):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    os.truncate(run.tar(0), cut_points(run)[where])
    with pytest.raises(CorruptShard, match="bytes instead of"):
        verify_shard(run, 0)
    with pytest.raises(CorruptShard, match="bytes instead of"):
        read(run, spec, 0)


def test_any_flipped_byte_is_found(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0])
    for path, step in ((run.tar(0), 997), (run.sidecar(0), 37)):
        whole = path.read_bytes()
        for place in range(0, len(whole), step):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            with pytest.raises(CorruptShard):
                read(run, spec, 0)
        path.write_bytes(whole)
    verify_shard(run, 0)


def test_quarantine_moves_and_tells_the_reason(run):
    spec = tiny_spec()
    write_tiny_shards(run, spec, [0, 1])
    seen = open_store(run).mark(0)
    folder = Path(open_store(run).quarantine(0, "a flipped byte", seen))
    assert committed(run).keys() == {1}
    reason = json.loads((folder / "00000000.reason.json").read_text())
    assert (reason["shard"], reason["reason"]) == (0, "a flipped byte")
    assert (folder / "00000000.tar").exists() and (folder / "00000000.json").exists()
    # A slower reader that saw the same bad bytes must not set the new, good shard aside.
    assert open_store(run).quarantine(0, "a flipped byte", seen) is None
    write_tiny_shards(run, spec, [0])
    assert open_store(run).quarantine(0, "a flipped byte", seen) is None
    assert committed(run).keys() == {0, 1}


def test_sidecar_of_another_shard_is_corrupt(run):
    write_tiny_shards(run, tiny_spec(), [0])
    for path in (RunDir.tar, RunDir.sidecar):
        path(run, 4).write_bytes(path(run, 0).read_bytes())
    with pytest.raises(ledger.MisplacedShard, match="shard 0"):
        verify_shard(run, 4)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_nonsense_is_not_a_sidecar(run, content):
    write_tiny_shards(run, tiny_spec(), [0])
    run.sidecar(0).write_bytes(content)
    with pytest.raises(CorruptShard):
        read_sidecar(run, 0)


def test_sidecar_survives_its_file(run):
    write_tiny_shards(run, tiny_spec(), [7])
    sidecar = read_sidecar(run, 7)
    assert Sidecar.from_bytes(sidecar.to_bytes()) == sidecar


# -----------------------------------------------------------------------------------------------
# The disk


@pytest.mark.parametrize("function", ["fsync", "link"])
@pytest.mark.parametrize("at", [0, 1])
def test_disk_full_leaves_no_temporary_file(run, monkeypatch, function, at):
    fault = FaultInjector(getattr(os, function), at, OSError(errno.ENOSPC, "No space left"))
    monkeypatch.setattr(os, function, fault)
    with pytest.raises(OSError, match=r"shard 0 .* could not be written .*max_bytes") as caught:
        write_tiny_shards(run, tiny_spec(), [0])
    assert caught.value.errno == errno.ENOSPC and fault.count == 1
    assert committed(run) == {} and set(names(run)) <= {"00000000.tar"}
    write_tiny_shards(run, tiny_spec(), [0])
    verify_shard(run, 0)


def test_a_write_that_stops_half_way_leaves_nothing(run):
    """The kernel itself refuses to let the file grow: a real short write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="samples_per_shard") as caught:
            write_tiny_shards(run, tiny_spec(64), [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert names(run) == []


def test_a_place_that_cannot_be_written_is_named(run):
    run.root.mkdir()
    run.shards.touch()
    with pytest.raises(OSError, match=r"shard 0 .* could not be written to .*/shards"):
        write_tiny_shards(run, tiny_spec(), [0])


def test_values_beyond_the_stored_type_are_refused(run):
    spec, made = tiny_spec(), tiny_shard(tiny_spec(), 0)
    made.states[1, 0, 2] = 1e6
    with pytest.raises(ValueError, match=r"trajectory\.dtype=float32"):
        write_shard(run, spec, 0, made, 1.0, "test")
    assert not run.shards.exists()
