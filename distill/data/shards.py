"""One shard of trajectories as a WebDataset tar: written, and read whole.

Members of sample i, key `<id, 12 digits>`: `meta.json` {"id", "label", "dtype"} and `states.npy`
[M, points, C, H, W] in the stored dtype (`distill.data.layout`), without state 0 when noise is not
stored; velocities, if stored, come behind the states. No pickle. Equal states give equal bytes:
names, order, times and headers are fixed.
"""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from webdataset.writer import TarWriter

from distill.data import layout
from distill.data.sidecar import CorruptShard, ShardSpec, Sidecar
from distill.data.stores.store import ShardStore, open_store, read_sidecar
from distill.flow.trajectory import GeneratedShard
from distill.run.files import RunDir

# -----------------------------------------------------------------------------------------------
# Write


def write_shard(
    run: RunDir,
    spec: ShardSpec,
    shard: int,
    generated: GeneratedShard,
    seconds: float,
    producer: str,
) -> Sidecar:
    """The sidecar of the committed shard: ours, or that of a producer who was faster.

    Raises:
        ValueError: a state is too large for the stored dtype.
        OSError: it could not be written (disk full, no permission). Nothing of it stays.
        ForeignShard: the place is taken by a shard of another run.
    """
    assert generated.ids.tolist() == list(spec.ids(shard))
    states, store = _to_stored(spec, generated), open_store(run)
    try:
        with store.room_for(shard) as path:
            sha256 = _write_tar(path, spec, generated, states)
            sidecar = Sidecar(
                shard=shard,
                spec=spec,
                num_bytes=layout.tar_bytes(spec),
                sha256=sha256,
                labels=tuple(generated.labels.tolist()),
                offsets=tuple(layout.state_offset(spec, index) for index in range(len(states))),
                member_bytes=layout.state_bytes(spec),
                nfe=generated.nfe,
                forwards=generated.forwards,
                seconds=round(seconds, 3),
                producer=producer,
                batch_size=generated.batch_size,
            )
            return store.publish(sidecar, path)
    except OSError as error:
        message = _write_failure(store, shard, states.nbytes, error)
        raise OSError(error.errno or errno.EIO, message) from error


def _to_stored(spec: ShardSpec, generated: GeneratedShard) -> np.typing.NDArray[Any]:
    """[N, *spec.sample_shape] as `stored_dtype`."""
    states = generated.states[:, :, -spec.num_states :]
    if spec.store_velocity:
        assert generated.velocities is not None
        states = torch.cat([states, generated.velocities], dim=2)
    assert states.shape == (spec.samples_per_shard, *spec.sample_shape), states.shape
    dtype = getattr(torch, spec.dtype)
    stored = states.to(dtype).contiguous()
    if not bool(torch.stack(states.aminmax()).to(dtype).isfinite().all()):  # rounding is monotone
        largest = float(states.abs().max())
        raise ValueError(
            f"states of {generated.ids[0]}..{generated.ids[-1]} reach {largest:.3g}, which "
            f"trajectory.dtype={spec.dtype} cannot hold; set trajectory.dtype=float32"
        )
    return stored.view(torch.int16).numpy().view(np.uint16) if _is_bits(spec) else stored.numpy()


def as_tensor(spec: ShardSpec, states: np.typing.NDArray[Any]) -> torch.Tensor:
    """Stored states as a tensor of the stored dtype. It shares the memory."""
    if _is_bits(spec):
        return torch.from_numpy(states.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(states)


def _is_bits(spec: ShardSpec) -> bool:
    """Whether NumPy sees bits rather than values."""
    return spec.dtype == "bfloat16"


def _write_failure(store: ShardStore, shard: int, num_bytes: int, error: OSError) -> str:
    advice = {
        errno.ENOSPC: "; free some space, or lower trajectory.max_bytes",
        errno.EDQUOT: "; the quota is used up: free some space, or lower trajectory.max_bytes",
        errno.EFBIG: "; lower trajectory.samples_per_shard, or raise the limit (ulimit -f)",
    }.get(error.errno or 0, "")
    return (
        f"shard {shard} ({num_bytes:,} bytes) could not be written to {store.root}: "
        f"{error.strerror or error}{advice}"
    )


class _Sink:
    """A file that hashes what it is given, and swallows writes after one has failed: the tar stream
    tries again when it is collected.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._failed = False
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Number of bytes taken."""
        if not self._failed:
            self._failed = True
            self._file.write(data)
            self._failed = False
            self.digest.update(data)
        return len(data)


def _write_tar(
    path: Path, spec: ShardSpec, generated: GeneratedShard, states: np.typing.NDArray[Any]
) -> str:
    """The sha256 of the tar in `path`, which is new and flushed to disk."""
    header = layout.npy_header(spec)
    content = states.astype(layout.stored_dtype(spec).newbyteorder("<"), copy=False)
    with path.open("xb") as file:
        sink = _Sink(file)
        writer = TarWriter(sink, encoder=False, compress=False, mtime=0, user="bowstring")
        for index, label, state in zip(
            generated.ids.tolist(), generated.labels.tolist(), content, strict=True
        ):
            meta = layout.meta_json(spec, index, label)
            writer.write(
                {
                    "__key__": f"{index:012d}",
                    layout.META: meta,
                    layout.STATES: header + state.tobytes(),
                }
            )
        writer.close()
        file.flush()
        os.fsync(file.fileno())
        assert file.tell() == layout.tar_bytes(spec)
    return sink.digest.hexdigest()


# -----------------------------------------------------------------------------------------------
# Read


def read_shard(
    run: RunDir,
    spec: ShardSpec,
    shard: int,
    states: np.typing.NDArray[Any],
    labels: np.typing.NDArray[np.int64],
) -> Sidecar:
    """The sidecar, after filling `states` [N, *spec.sample_shape] of `stored_dtype`, `labels` [N].

    The whole tar is read in one go and its sha256 checked.

    Raises:
        FileNotFoundError: the shard is not there.
        CorruptShard: a byte is not as it was written.
        ForeignShard: it was made for another run.
    """
    store, sidecar = open_store(run), read_sidecar(run, shard)
    place = store.place(shard)
    sidecar.check_spec(place, spec)
    view = memoryview(store.read_tar(sidecar))
    for index, offset in enumerate(sidecar.offsets):
        states[index] = _decode(place, sidecar, index, view[offset : offset + sidecar.member_bytes])
    labels[:] = sidecar.labels
    return sidecar


def _decode(
    place: str, sidecar: Sidecar, index: int, content: memoryview
) -> np.typing.NDArray[Any]:
    """The array in a states.npy, a view of `content`."""
    header, spec = layout.npy_header(sidecar.spec), sidecar.spec
    if bytes(content[: len(header)]) != header or len(content) != layout.state_bytes(spec):
        raise CorruptShard(
            f"{place}: sample {sidecar.ids[index]} is not the array that its sidecar promises"
        )
    dtype = layout.stored_dtype(spec).newbyteorder("<")
    return np.frombuffer(content[len(header) :], dtype=dtype).reshape(spec.sample_shape)
