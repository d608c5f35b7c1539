"""The export for FastGen holds the best teacher's states, whole shards only, and goes on."""

import errno
import io
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import webdataset

from distill.config import ConfigError
from distill.data.sidecar import CorruptShard
from distill.export.fastgen import export_fastgen
from distill.flow.noise import sample_noise
from distill.run.files import RunDir
from distill.testing import (
    FaultInjector,
    tiny_shard,
    tiny_spec,
    write_tiny_record,
    write_tiny_shards,
)

CLASSES = 10


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    write_tiny_record(run, {"data": {"num_classes": CLASSES}})
    return run


def load(data: bytes) -> torch.Tensor:
    return torch.load(io.BytesIO(data), weights_only=True)


def read(out) -> list[dict]:
    """Every sample, as bytes, by plain webdataset."""
    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("store_noise", [True, False])
def test_plain_webdataset_reads_the_best_teachers_states(run, dtype, store_noise):
    spec = tiny_spec(grid=4, dtype=dtype, store_noise=store_noise)
    write_tiny_shards(run, spec, [0, 1])
    out = export_fastgen(run, run.root / "fastgen")
    samples = read(out)
    made = [tiny_shard(spec, shard) for shard in (0, 1)]
    states = torch.cat([shard.states for shard in made])[:, -1].to(getattr(torch, dtype))
    labels = [int(label) for shard in made for label in shard.labels]
    assert [sample["__key__"] for sample in samples] == [f"{index:012d}" for index in range(8)]
    for index, sample in enumerate(samples):
        path = load(sample["path.pth"])
        assert torch.equal(load(sample["latent.pth"]), states[index, -1])
        assert torch.equal(path, states[index, :-1]) and path.dtype == states.dtype
        assert torch.equal(load(sample["noise.pth"]), path[0])
        assert load(sample["label.pth"]).tolist() == [k == labels[index] for k in range(CLASSES)]
        assert json.loads(sample["json"]) == {"id": index, "label": labels[index]}
        assert len(sample["noise.pth"]) < 4096  # a view would be saved with all that it views
    noise = torch.from_numpy(sample_noise(spec.seed, np.arange(8), spec.image))
    assert torch.equal(states[:, 0], noise.to(states.dtype))
    index = json.loads((out / "index.json").read_text())
    assert index["path_timesteps"] == [1.0, 0.75, 0.5, 0.25]  # FastGen's noise is at 1
    assert index["teacher"]["name"] == "teacher1"
    counts = json.loads((out / "shard_count.json").read_text())
    assert counts == {"00000000.tar": 4, "00000001.tar": 4}


def test_a_view_does_not_drag_its_base_along(run):
    spec = tiny_spec(64, grid=2)
    write_tiny_shards(run, spec, [0])
    sizes = {len(sample["noise.pth"]) for sample in read(export_fastgen(run, run.root / "out"))}
    buffer = io.BytesIO()
    torch.save(torch.zeros(spec.image, dtype=torch.float16), buffer)
    assert sizes == {len(buffer.getvalue())}


def test_an_unconditional_teacher_has_no_label(run):
    write_tiny_record(run, {"data": {"num_classes": 0}})
    write_tiny_shards(run, tiny_spec(), [0])
    assert "label.pth" not in read(export_fastgen(run, run.root / "out"))[0]


def test_shards_that_are_gone_are_left_out_and_that_is_said(run, capsys):
    write_tiny_shards(run, tiny_spec(), [1, 3])
    assert len(read(export_fastgen(run, run.root / "out"))) == 8
    said = capsys.readouterr().err
    assert said == "left out, since set aside, or not made yet: 2 shards, 00000000, 00000002\n"


def test_shards_that_were_deleted_for_room_are_told_apart(run, capsys):
    write_tiny_shards(run, tiny_spec(), [2, 4])
    assert len(read(export_fastgen(run, run.root / "out", evicted={0, 1, 2, 5}))) == 8
    assert capsys.readouterr().err.splitlines() == [
        "left out, since deleted for room: 3 shards, 00000000 to 00000001, 00000005",
        "left out, since set aside, or not made yet: 1 shards, 00000003",
    ]


def test_a_run_whose_shards_are_all_gone_says_so(run):
    with pytest.raises(ConfigError, match="no shards any more: 2 were deleted for room"):
        export_fastgen(run, run.root / "out", evicted={0, 1})


def test_an_export_that_was_cut_off_goes_on(run, monkeypatch):
    write_tiny_shards(run, tiny_spec(), [0, 1, 2])
    out = run.root / "out"
    # index.json and its folder, shard 0 and its folder are flushed; then the disk is full.
    fault = FaultInjector(os.fsync, 4, OSError(errno.ENOSPC, "No space left"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", fault)
        export_fastgen(run, out)
    assert fault.count == 1
    assert sorted(path.name for path in out.iterdir()) == ["00000000.tar", "index.json"]
    first = (out / "00000000.tar").stat()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = out / f".00000001.tar.tmp-{socket.gethostname()}-{dead.pid}-0123abcd"
    left.write_bytes(b"half")
    export_fastgen(run, out)
    assert (out / "00000000.tar").stat().st_ino == first.st_ino and not left.exists()
    assert [int(sample["__key__"]) for sample in read(out)] == list(range(12))
    write_tiny_shards(run, tiny_spec(), [3])  # the run goes on, and so does its export
    export_fastgen(run, out)
    assert [int(sample["__key__"]) for sample in read(out)] == list(range(16))


def test_twice_gives_the_same_bytes(run):
    write_tiny_shards(run, tiny_spec(), [0])
    first, second = (export_fastgen(run, run.root / name) for name in ("a", "b"))
    assert (first / "00000000.tar").read_bytes() == (second / "00000000.tar").read_bytes()


def test_a_bad_shard_is_named_and_not_exported(run):
    write_tiny_shards(run, tiny_spec(), [0])
    content = bytearray(run.tar(0).read_bytes())
    content[2000] ^= 1
    run.tar(0).write_bytes(content)
    with pytest.raises(CorruptShard, match=r"00000000.tar: sha256 differs"):
        export_fastgen(run, run.root / "out")
    assert [path.name for path in (run.root / "out").iterdir()] == ["index.json"]


def test_another_export_is_not_mixed_in(run, tmp_path):
    write_tiny_shards(run, tiny_spec(), [0])
    out = export_fastgen(run, tmp_path / "out")
    other = RunDir(tmp_path / "other")
    write_tiny_record(other, {"data": {"num_classes": CLASSES}})
    with pytest.raises(ConfigError, match="no shards yet"):
        export_fastgen(other, out)
    write_tiny_shards(other, tiny_spec(seed=4), [0])
    with pytest.raises(ConfigError, match=r"holds an export of other trajectories; .* --out"):
        export_fastgen(other, out)
    with pytest.raises(ConfigError, match="holds shards that are no export"):
        export_fastgen(other, run.shards)
