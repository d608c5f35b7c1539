"""A run of version 0.1.0, stopped at step 4 of 8: it opens, and goes on to its end."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.inspect.status import status
from cluster.inspect.verify import audit
from cluster.settings.file import load_config
from cluster.state.done import check_all, unfinished
from cluster.supervisor import runner, stages
from distill.checkpoint import manifest
from distill.checkpoint.manifest import step_name
from distill.data.stores.local import LocalStore
from distill.run.files import RunDir, sha256_file, write_json
from distill.run.identity import hash_of

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run-0.1"
# Of the ids that its first steps read, as `bowstring verify` of version 0.1.0 printed them.
FOUR_STEPS = "569ff2a51e20decf3a6bcccfc65532478b57939d13cc9b023430ac71f110eaf0"
EIGHT_STEPS = "14b43a68fef2fa24ec114612208945c33b19d4136fd852691d9757a6744aab5d"


@pytest.fixture
def run(tmp_path):
    return RunDir(shutil.copytree(FIXTURE, tmp_path / "run"))


def test_it_opens(run):
    found = status(run)
    assert (found["stage"], found["train"]["step"], found["train"]["max_steps"]) == ("train", 4, 8)
    assert load_config(run).trajectory.spread == 1
    assert (found["shards"]["committed"], found["shards"]["planned"]) == (4, 8)
    assert found["checkpoint"] == {"step": 4, "checked": "sha256", "newer_bad": []}
    proof = audit(run)
    assert proof["ok"] and proof["checkpoints"]["verified"] == [4]
    assert (proof["consumed_steps"], proof["consumed_sha256"]) == (4, FOUR_STEPS)


@pytest.mark.timeout(600)
def test_it_goes_on_to_its_end(run):
    """In a folder of another name, and as if it were older than a setting: the record stands."""
    record = json.loads(run.identity.read_text())
    del record["identity"]["train"]["grad_clip"]
    older = hash_of(record["identity"])
    write_json(run.identity, record | {"hash": older})
    of_checkpoint = run.checkpoints / step_name(4) / "MANIFEST.json"
    write_json(of_checkpoint, json.loads(of_checkpoint.read_text()) | {"config_hash": older})
    before = run.identity.read_bytes()
    tars = {path: path.read_bytes() for path in run.shards.glob("*.tar")}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", "run", str(run.root), "--no-evaluation"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    proof = audit(run)
    assert proof["ok"] and proof["consumption"] == [] and proof["shards"] == 8
    assert (proof["consumed_steps"], proof["consumed_sha256"]) == (8, EIGHT_STEPS)
    now = json.loads(run.identity.read_text())
    assert now.pop("trials").keys() == record["teachers"].keys()  # the teacher is tried now
    assert now["stream"].pop("spread") == 1
    assert now == json.loads(before) and len(tars) == 4
    assert all(path.read_bytes() == content for path, content in tars.items())
    last = json.loads((run.checkpoints / step_name(8) / "MANIFEST.json").read_text())
    assert last["config_hash"] == json.loads(before)["hash"]


# -----------------------------------------------------------------------------------------------
# What a start reads

_opened: list[str] | None = None


def _note(event, args):
    if _opened is not None and event == "open":
        _opened.append(str(args[0]))


sys.addaudithook(_note)  # for good: there is no way back


@contextmanager
def opened():
    """The paths of all files that this process opens meanwhile."""
    global _opened
    _opened = found = []
    try:
        yield found
    finally:
        _opened = None


def test_a_resume_reads_each_file_of_the_run_once(run, monkeypatch):
    """Under the lock. Before it, the command line compares run.json once more."""
    listings, hashed, works = [], [], []
    listing = LocalStore.listing
    monkeypatch.setattr(LocalStore, "listing", lambda s: listings.append(1) or listing(s))
    monkeypatch.setattr(
        manifest.files, "sha256_file", lambda path: hashed.append(str(path)) or sha256_file(path)
    )
    monkeypatch.setattr(runner, "_work", lambda session, work: works.append(work))
    write_json(run.evicted, {"shards": []})
    config = load_config(run)
    with opened() as files:
        check_all([config])
        assert unfinished([config]) == [config]
    assert (files.count(str(run.identity)), listings, hashed) == (1, [], [])
    with opened() as files:
        assert runner.supervise(config, stages.pretrain, stages.distil) == 0
    assert files.count(str(run.identity)) == 1
    assert files.count(str(run.evicted)) == 1
    assert listings == [1]
    assert hashed == [str(run.checkpoints / step_name(4) / "rank_00000.safetensors")]
    (work,) = works
    assert set(work.pool.coordinator.committed) == {0, 1, 2, 3}
    assert work.job.config_hash == json.loads(run.identity.read_text())["hash"]


def test_work_makes_a_stage_look_again(run, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "_work", lambda session, work: shutil.rmtree(run.checkpoints))

    def after(session, view):
        seen.append(view.step)
        return stages.Work()

    assert runner.supervise(load_config(run), after, after, stages.train, after) == 0
    assert seen == [4, 4, 0]
