"""A run whose shards lie in an object store: real workers, a real server that speaks S3."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
import torch

from cluster.inspect.verify import audit
from cluster.plan.stream import stream_order, stream_plan
from cluster.settings.file import load_config, save_config
from cluster.settings.hydra import compose
from cluster.state.done import with_absolute_paths
from cluster.state.evicted import evict, read_evicted
from cluster.state.identity import identity_of
from distill.config import ConfigError
from distill.data.generate import generate_shard
from distill.data.shards import write_shard
from distill.data.stores import bucket as object_store
from distill.data.stores.objects import Objects
from distill.data.stores.store import committed, open_store, read_sidecar
from distill.data.stream import TrajectoryStream
from distill.run.files import RunDir, read_lines
from distill.teachers.build import build_teacher

STEPS = 80  # 4 steps read a block of 2 shards
# Makes the shards of a run. The worker that makes shard 3 first dies between tar and sidecar.
GENERATE = """
import os, signal, sys
from pathlib import Path
from cluster.supervisor import runner
from cluster.pool import pool
from cluster.settings.file import load_config
from cluster.pool.worker import TeacherWorker
from distill.run.files import RunDir

class MortalWorker(TeacherWorker):
    def produce(self, shard):
        from distill.data.stores.objects import Objects
        struck = self._run.root / "struck"
        def die(*_):
            struck.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == 3 and not struck.exists():
            Objects.create = die
        return super().produce(shard)

pool.TeacherWorker = MortalWorker
sys.exit(runner.generate(load_config(RunDir(Path(sys.argv[1])))))
"""


def tiny_run(root, location=""):
    """Two teacher workers on a closed-form teacher."""
    mixture = {
        "shape": [1, 8, 8],
        "means": [[level] * 64 for level in (-0.5, 0.5)],
        "stds": [0.2, 0.1],
    }
    root.mkdir(parents=True)
    path = root.parent / "mixture.json"
    path.write_text(json.dumps(mixture))
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={root}",
            "data.num_classes=0",
            "~teacher",
            "+teacher={mixture: {kind: analytic, path: " + str(path) + ", steps: 8}}",
            f"train.max_steps={STEPS}",
            f"trajectory.location={location}",
        ]
    )
    return config


def start(root):
    log = (root.parent / "log.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-c", GENERATE, str(root)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def bowstring(*args):
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=60,
    )


def local_twin(config, spec, root):
    """The same shards in a folder, made in this process."""
    run = RunDir(root)
    teachers = {name: build_teacher(teacher, "cpu") for name, teacher in config.teacher.items()}
    for shard in range(stream_plan(config).shards):
        made = generate_shard(teachers, config.teacher, config.trajectory, 0, shard, "cpu")
        write_shard(run, spec, shard, made, 0.0, "twin")
    return run


def departed(run):
    return [e for e in read_lines(run.events) if e["kind"] == "worker_leave"]


@pytest.mark.timeout(300)  # two starts of Ray, nearly all of it
def test_shards_of_a_killed_run_in_s3_are_those_of_a_local_one(
    bucket, tmp_path, monkeypatch, write_checkpoint
):
    config = tiny_run(tmp_path / "run", f"{bucket}/{uuid.uuid4().hex}")
    run, log = config.files, tmp_path / "log.txt"
    planned = stream_plan(config).shards
    save_config(run, config)
    first = start(run.root)
    while not (run.root / "struck").exists() or len(committed(run)) < 6 or not departed(run):
        assert first.poll() is None, log.read_text()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(0.5)  # the server finishes what it was told
    before = committed(run)
    assert 6 <= len(before) < planned
    assert (
        len(departed(run)) == 1
        and len({e["worker"] for e in read_lines(run.events) if "shard" in e}) > 1
    )

    # Nothing is left of the first start but the list of what lies in the bucket.
    run.events.unlink()
    assert start(run.root).wait() == 0, log.read_text()
    made = [e["shard"] for e in read_lines(run.events) if e["kind"] == "commit"]
    assert sorted(made) == sorted(set(range(planned)) - before.keys())
    assert not run.shards.exists() and not (run.root / "shards").exists()
    assert config.trajectory.location not in run.identity.read_text()

    report = bowstring("verify", str(run.root), "--json")
    found = json.loads(report.stdout)
    assert report.returncode == 0 and found["ok"], report
    assert found["shards"] == planned and len(found["orphans"]) >= 1  # of the worker that died
    seen = json.loads(bowstring("status", str(run.root), "--json").stdout)["shards"]
    assert seen["committed"] == planned and seen["bytes"] == sum(committed(run).values())
    monkeypatch.setattr(object_store.files, "STALE_S", -60.0)
    assert sorted(open_store(run).clear()) == sorted(found["orphans"])

    spec = read_sidecar(run, 0).spec
    twin = local_twin(config, spec, tmp_path / "twin")
    for shard in range(planned):
        tar = Objects(run.location).read(read_sidecar(run, shard).tar_name)
        assert tar == twin.tar(shard).read_bytes()
    order, trajectory = stream_order(config), config.trajectory
    streams = [
        TrajectoryStream(place, spec, trajectory, order, 0, 1, [[1.0]], lambda: False)
        for place in (run, twin)
    ]
    for step in range(12):
        ours, theirs = (stream.read(step) for stream in streams)
        assert torch.equal(ours.states, theirs.states) and torch.equal(ours.ids, theirs.ids)

    write_checkpoint(run, 8)  # two blocks are behind it
    evict(run, (0, 1, 2, 3), step=8)
    assert committed(run).keys() == set(range(4, planned))
    assert read_evicted(run, committed(run)) == {0, 1, 2, 3}
    assert len(Objects(run.location).sizes()) == 2 * planned - 4
    found = audit(run)
    assert not any(found[key] for key in ("missing", "duplicate", "corrupt", "consumption"))
    assert found["evicted"] == 4  # and a checkpoint without the records of its steps is said
    steps, saves = found["records"]
    assert steps.startswith(
        "there is a checkpoint of step 8, and run/events.jsonl tells of 0 steps"
    )
    assert saves.startswith("run/events.jsonl does not tell of the checkpoints of steps 8: ")


def test_an_unreachable_store_is_one_sentence_that_names_the_setting(tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "run", "s3://bucket/run")
    save_config(config.files, config)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hunter1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    result = bowstring("status", str(config.run.dir))
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: trajectory.location=s3://bucket/run: ")
    assert "hunter" not in result.stderr


def test_the_place_of_the_shards_is_not_part_of_a_run(tmp_path):
    here, there = tiny_run(tmp_path / "a"), tiny_run(tmp_path / "b", "s3://bucket/run")
    here.teacher["mixture"].path = there.teacher["mixture"].path
    assert identity_of(here) == identity_of(there)


def test_a_folder_is_made_absolute_for_workers_and_a_url_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, url = tiny_run(tmp_path / "a", "fast"), tiny_run(tmp_path / "b", "s3://bucket/run")
    assert with_absolute_paths(folder).trajectory.location == str(tmp_path / "fast")
    assert with_absolute_paths(url).trajectory.location == "s3://bucket/run"


def test_memory_is_refused_for_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"trajectory\.location=memory://x lives in one process"):
        tiny_run(tmp_path / "run", "memory://x")


def test_secrets_on_the_command_line_are_refused_before_anything_is_written(tmp_path):
    location = "trajectory.location=s3://hunter1:hunter2@bucket/run"
    result = bowstring("generate", "experiment=tiny", f"run.dir={tmp_path / 'run'}", location)
    assert result.returncode == 2 and "environment" in result.stderr
    assert "hunter" not in result.stderr + result.stdout and not (tmp_path / "run").exists()


def test_a_folder_inside_the_run_moves_with_it(tmp_path):
    config = tiny_run(tmp_path / "run", str(tmp_path / "run" / "elsewhere"))
    save_config(config.files, config)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = load_config(RunDir(tmp_path / "moved"))
    assert moved.trajectory.location == str(tmp_path / "moved" / "elsewhere")
