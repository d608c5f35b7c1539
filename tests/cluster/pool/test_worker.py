"""A teacher worker in an address space that is too small for its batch: the real allocator fails.

The first velocity of a batch takes several arrays [B, K, D] of K components in D dimensions.
"""

import json
import resource
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.pool.worker import TeacherWorker
from cluster.settings.hydra import compose
from distill.data.layout import stored_dtype
from distill.data.shards import read_shard
from distill.data.sidecar import shard_spec
from distill.data.stores.store import read_sidecar
from distill.flow.curve import own_error
from distill.run.files import RunDir
from distill.teachers.build import build_teacher
from distill.testing import run_ranks

SHARDS, SAMPLES = 3, 48


def make_worker(folder, components):
    """A worker on a mixture; an array of all samples of a shard has K * 12 kB."""
    draw = np.random.Generator(np.random.Philox(key=[1, 2]))
    means = draw.standard_normal((components, 64)).round(3).tolist()
    mixture = {"shape": [1, 8, 8], "means": means, "stds": [0.3] * components}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mixture.json").write_text(json.dumps(mixture))
    path = folder / "mixture.json"
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={folder}",
            "~teacher",
            "+teacher={only: {kind: analytic, path: " + str(path) + ", steps: 8}}",
            f"trajectory.samples_per_shard={SAMPLES}",
            f"trajectory.batch_size={SAMPLES}",
            "trajectory.dtype=float32",
        ]
    )
    fingerprint = build_teacher(config.teacher["only"], "cpu").fingerprint
    spec = shard_spec(
        config.seed, config.data.image, config.trajectory, config.teacher, {"only": fingerprint}
    )
    worker = TeacherWorker(config, RunDir(folder), spec, "cpu")
    worker.load()
    return worker, spec


@contextmanager
def little_memory(more):
    """Lets this process take `more` bytes, and no more: also not what it has freed and kept."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    here, most = pages * resource.getpagesize(), resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (here, most))
    kept = []
    with suppress(MemoryError):
        while True:
            kept.append(bytearray(1 << 16))
    resource.setrlimit(resource.RLIMIT_AS, (here + more, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def work_in_little_memory(rank, world_size, folder):
    """What a worker tells of its shards, and the error of one whose single samples do not fit."""
    worker, _ = make_worker(Path(folder) / "small", components=512)
    hopeless, _ = make_worker(Path(folder) / "hopeless", components=20_000)
    with little_memory(16_000_000):
        told = [worker.produce(shard) for shard in range(SHARDS)]
    with little_memory(4_000_000), pytest.raises(RuntimeError, match="can't allocate memory"):
        hopeless.produce(0)
    return told


def test_a_worker_with_little_memory_halves_its_batch_and_makes_the_same_samples(tmp_path):
    (told,) = run_ranks(work_in_little_memory, 1, tmp_path / "ranks", str(tmp_path))
    small, whole = RunDir(tmp_path / "small"), RunDir(tmp_path / "whole")
    worker, spec = make_worker(whole.root, components=512)
    for shard in range(SHARDS):
        assert "batch_size" not in worker.produce(shard)
    said = [facts["batch_size"] for facts in told if "batch_size" in facts]
    assert "batch_size" in told[0] and all(SAMPLES % size == 0 for size in said)
    assert said == sorted(set(said), reverse=True)  # kept for life: said when it shrinks only
    batch = SAMPLES
    for shard in range(SHARDS):
        batch = told[shard].get("batch_size", batch)
        ours, theirs = (read(run, spec, shard) for run in (small, whole))
        assert (ours[0].batch_size, theirs[0].batch_size) == (batch, SAMPLES)
        for key in ("shard", "spec", "labels", "nfe", "forwards", "num_bytes"):
            assert getattr(ours[0], key) == getattr(theirs[0], key)
        assert (ours[1][:, :, 0] == theirs[1][:, :, 0]).all()  # the noise
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_the_first_shard_tells_what_the_curve_between_its_states_is_off_by(tmp_path):
    worker, spec = make_worker(tmp_path, components=4)
    told = [worker.produce(shard) for shard in range(2)]
    states = torch.from_numpy(read(RunDir(tmp_path), spec, 0)[1])[:, 0]
    expected = own_error(states, torch.tensor(spec.times))
    assert told[0]["curve_error"] == pytest.approx(expected, rel=1e-5) and expected > 0
    assert "curve_error" not in told[1]


def read(run, spec, shard):
    """Sidecar and states of a shard."""
    states = np.empty((SAMPLES, *spec.sample_shape), dtype=stored_dtype(spec))
    read_shard(run, spec, shard, states, np.empty(SAMPLES, dtype=np.int64))
    return read_sidecar(run, shard), states


def test_a_shard_that_another_worker_has_made_is_dropped_at_the_next_evaluation(tmp_path):
    worker, spec = make_worker(tmp_path, components=4)
    beat, count = worker._beat, []

    def beat_and_drop():
        count.append(1)
        if len(count) == 3:
            worker.drop(0)
        beat()

    worker._beat = beat_and_drop
    assert worker.produce(0) is None and len(count) == 3
    assert not RunDir(tmp_path).tar(0).exists()
    assert worker.produce(0)["bytes"] > 0  # to be told once is no ban
    assert read(RunDir(tmp_path), spec, 0)[0].shard == 0
