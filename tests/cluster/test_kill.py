"""kill -9 of a whole run in the middle: the same command goes on with the same sequence, also
where read shards must go to make room for new ones.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.compose import compose
from cluster.configfile import save_config
from cluster.job import stream_order
from cluster.plan import stream_plan
from cluster.progress import last_step
from cluster.verify import audit
from distill.rundir import RunDir, read_lines
from distill.store import committed

STEPS, KILL_AT = 120, 12
FIT = 12  # shards that fit on disk, of the 60 that are made; the least that is not refused
DISTIL = """
import sys
from pathlib import Path
from cluster import runner, stages
from cluster.configfile import load_config
from distill.rundir import RunDir
sys.exit(runner.supervise(load_config(RunDir(Path(sys.argv[1]))), stages.distil))
"""


def tiny_run(root):
    """A run of two teacher actors and two trainer ranks on a closed-form teacher."""
    mixture = {
        "shape": [1, 8, 8],
        "means": [[level] * 64 for level in (-0.5, 0.5)],
        "stds": [0.2, 0.1],
    }
    root.mkdir()
    path = root.parent / "mixture.json"
    path.write_text(json.dumps(mixture))
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={root}",
            "~teacher",
            "+teacher={mixture: {kind: analytic, path: " + str(path) + ", steps: 8}}",
            f"train.max_steps={STEPS}",
            "train.save_every=5",
        ]
    )
    config.trajectory.max_bytes = FIT * stream_plan(config).shard_bytes
    return config


def start(root):
    log = (root.parent / "log.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-c", DISTIL, str(root)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(600)  # under a minute on two idle cores
def test_a_killed_run_goes_on_with_the_same_sequence(tmp_path):
    run = RunDir(tmp_path / "run")
    config = tiny_run(run.root)
    save_config(run, config)
    first = start(run.root)
    while last_step(run.metrics) < KILL_AT:
        assert first.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert last_step(run.metrics) < STEPS

    assert start(run.root).wait() == 0, (tmp_path / "log.txt").read_text()
    resumed = [event["step"] for event in read_lines(run.events) if event["kind"] == "resume"]
    assert resumed[0] == 0
    assert len(resumed) == 2 and KILL_AT - 10 <= resumed[1] < STEPS

    order, seen = stream_order(config), set()
    for event in read_lines(run.events):
        if event["kind"] == "steps":
            steps = range(event["first"], event["last"] + 1)
            ids = b"".join(order.entries(step)[0].astype("<i8").tobytes() for step in steps)
            assert event["ids_sha256"] == hashlib.sha256(ids).hexdigest()
            seen.update(steps)
    assert seen == set(range(STEPS))
    report = audit(run)
    assert report["ok"], report
    assert len(committed(run)) <= FIT and report["evicted"] >= 60 - FIT
