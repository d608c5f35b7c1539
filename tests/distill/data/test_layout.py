"""The bytes of a shard are known before it is made, and are those of NumPy and webdataset."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset

from distill.data.layout import npy_header, sidecar_bytes, state_bytes, stored_dtype, tar_bytes
from distill.data.shards import write_shard
from distill.run.files import RunDir
from distill.testing import tiny_shard, tiny_spec


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("store_noise", [True, False])
@pytest.mark.parametrize("image", [(1, 8, 8), (3, 32, 32), (4, 32, 32)])
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.25, 0.5, 1.0)])
def test_sizes_are_known_before_anything_is_written(run, dtype, store_noise, image, times):
    """The tar to the byte, tar and sidecar together within 1 %, for shards of any shape."""
    for count, teachers in ((2, 1), (37, 3)):
        spec = replace(
            tiny_spec(count, teachers=teachers, dtype=dtype, store_noise=store_noise),
            image=image,
            times=times,
        )
        sidecar = write_shard(run, spec, count, tiny_shard(spec, count), 1.5, "host-1234")
        size = run.tar(count).stat().st_size
        whole = size + run.sidecar(count).stat().st_size
        assert tar_bytes(spec) == size == sidecar.num_bytes
        assert sidecar.member_bytes == state_bytes(spec)
        assert tar_bytes(spec) + sidecar_bytes(spec, count) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_bytes_are_those_of_webdatasets_own_writer(run, dtype):
    spec = replace(tiny_spec(7, dtype=dtype), image=(3, 9, 9))
    made = tiny_shard(spec, 123456)
    write_shard(run, spec, 123456, made, 1.0, "test")
    plain = io.BytesIO()
    writer = webdataset.TarWriter(plain, compress=False, mtime=0, user="bowstring")
    for index, label, states in zip(made.ids, made.labels, made.states, strict=True):
        bits = states.to(getattr(torch, dtype))
        array = bits.view(torch.int16).numpy().view("u2") if dtype == "bfloat16" else bits.numpy()
        meta = {"id": int(index), "label": int(label), "dtype": dtype}
        writer.write({"__key__": f"{index:012d}", "meta.json": meta, "states.npy": array})
    writer.close()
    assert run.tar(123456).read_bytes() == plain.getvalue()


def test_header_is_numpys():
    wide = tiny_spec(dtype="float32", teachers=1, grid=100)
    for spec in (tiny_spec(), tiny_spec(dtype="bfloat16"), wide):
        size = int(np.prod(spec.sample_shape)) * stored_dtype(spec).itemsize
        array = np.load(io.BytesIO(npy_header(spec) + bytes(size)), allow_pickle=False)
        assert array.shape == spec.sample_shape and array.dtype == stored_dtype(spec)
        assert len(npy_header(spec)) % 64 == 0
