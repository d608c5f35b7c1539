"""The bytes of a shard: how values are stored, the header of an array, sizes in the tar. No torch.

    float16, float32   as they are
    bfloat16           NPY has no such type: its 16 bits as uint16, the upper half of a float32

In the tar a sample is header, meta.json, header, states.npy; each part begins at a block of 512
bytes and the first three take one each, so all samples take the same room. Two empty blocks end
the tar, padded to a record of 10,240 bytes.
"""

import json
from math import ceil, prod

import numpy as np

from distill.data.sidecar import ShardSpec, Sidecar

TAR_BLOCK, TAR_RECORD = 512, 10240
META, STATES = "meta.json", "states.npy"
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


def sample_room(spec: ShardSpec) -> int:
    """Bytes from one sample's first header to the next one's."""
    return (3 + ceil(state_bytes(spec) / TAR_BLOCK)) * TAR_BLOCK


def state_offset(spec: ShardSpec, index: int) -> int:
    """Where the content of states.npy of a shard's sample starts."""
    return index * sample_room(spec) + 3 * TAR_BLOCK


def tar_bytes(spec: ShardSpec) -> int:
    """Length of a shard's tar."""
    used = spec.samples_per_shard * sample_room(spec) + 2 * TAR_BLOCK
    return ceil(used / TAR_RECORD) * TAR_RECORD


def sidecar_bytes(spec: ShardSpec, shard: int) -> int:
    """Length of a shard's sidecar, but for a few digits of what is known only once it is made."""
    count = spec.samples_per_shard
    sidecar = Sidecar(
        shard=shard,
        spec=spec,
        num_bytes=tar_bytes(spec),
        sha256=64 * "0",
        labels=(0,) * count,
        offsets=tuple(state_offset(spec, index) for index in range(count)),
        member_bytes=state_bytes(spec),
        nfe=100 * count,
        forwards=100 * count,
        seconds=10.0,
        producer="hostname-00000",
        batch_size=count,
    )
    return len(sidecar.to_bytes())
