"""The bytes of a shard: how values are stored, the header of an array, sizes in the tar. No torch.

    float16, float32   as they are
    bfloat16           NPY has no such type: its 16 bits as uint16, the upper half of a float32

A tar pads every member to blocks of 512 bytes behind a header of one block, and ends with two empty
blocks, padded to a record of 10,240 bytes.
"""

from __future__ import annotations

import json
from math import ceil, prod

import numpy as np

from distill.ledger import ShardSpec, Sidecar

TAR_BLOCK, TAR_RECORD = 512, 10240
STORED = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}


def stored_dtype(spec: ShardSpec) -> np.dtype:
    """The NumPy type that holds a stored value."""
    return np.dtype(STORED[spec.dtype])


def npy_header(spec: ShardSpec) -> bytes:
    """The header of a sample's states.npy: NPY format 1.0, padded to a multiple of 64 bytes.

    Written here, not by NumPy, whose padding differs between versions.
    """
    descr = stored_dtype(spec).newbyteorder("<").str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {spec.sample_shape}, }}"
    size = ceil((10 + len(text) + 1) / 64) * 64
    text = text.ljust(size - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


def meta_json(spec: ShardSpec, sample_id: int, label: int) -> bytes:
    """The content of a sample's meta.json."""
    return json.dumps({"id": sample_id, "label": label, "dtype": spec.dtype}).encode()


def state_bytes(spec: ShardSpec) -> int:
    """Length of a sample's states.npy."""
    return len(npy_header(spec)) + prod(spec.sample_shape) * stored_dtype(spec).itemsize


def padded(num_bytes: int) -> int:
    """Room that content of `num_bytes` takes in a tar, without its header."""
    return ceil(num_bytes / TAR_BLOCK) * TAR_BLOCK


def tar_bytes(spec: ShardSpec, shard: int) -> int:
    """Length of a shard's tar. Labels of any length fit the block that meta.json takes."""
    meta = len(meta_json(spec, spec.ids(shard)[-1], -1))
    sample = 2 * TAR_BLOCK + padded(meta) + padded(state_bytes(spec))
    return ceil((spec.samples_per_shard * sample + 2 * TAR_BLOCK) / TAR_RECORD) * TAR_RECORD


def sidecar_bytes(spec: ShardSpec, shard: int) -> int:
    """Length of a shard's sidecar, but for a few digits of what is known only once it is made."""
    size, count = tar_bytes(spec, shard), spec.samples_per_shard
    sidecar = Sidecar(
        shard=shard,
        spec=spec,
        num_bytes=size,
        sha256=64 * "0",
        labels=(0,) * count,
        offsets=tuple(size * index // count for index in range(count)),
        member_bytes=state_bytes(spec),
        nfe=100 * count,
        forwards=100 * count,
        seconds=10.0,
        producer="hostname-00000",
    )
    return len(sidecar.to_bytes())
