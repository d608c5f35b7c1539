"""The audit finds every loss, duplicate and corruption, and only those."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cluster.inspect.status import status
from cluster.inspect.verify import audit
from cluster.settings.file import load_config, save_config
from cluster.state.evicted import evict
from cluster.state.lock import held
from distill.checkpoint.manifest import KEPT, committed_steps, read_manifest, write_manifest
from distill.config import ConfigError
from distill.data.order import Order
from distill.data.stores.store import open_store
from distill.run import files
from distill.run.events import Commit, MakeAgain, Quarantine, Resume, Save, Steps, append
from distill.run.files import RunDir
from distill.run.identity import StreamRecord
from distill.testing import tiny_spec, write_tiny_record, write_tiny_shards

# Blocks of 2 shards of 4 samples, read twice: 16 entries a block, 8 a step, so 2 steps a block.
STREAM = StreamRecord(seed=3, samples_per_shard=4, block_shards=2, passes=2, batch_size=8)
ORDER = Order(seed=3, block_samples=8, passes=2, batch_size=8)


def window(first: int, last: int) -> Steps:
    """The event of steps first..last, hashed by hand."""
    ids = np.concatenate([ORDER.entries(step)[0] for step in range(first, last + 1)])
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    return Steps(first, last, digest)


def made(shard: int) -> Commit:
    """The event of a shard that stands on disk."""
    return Commit(shard, "host:1", 1000, 1.0)


@pytest.fixture
def run(tmp_path, write_checkpoint) -> RunDir:
    """Six shards, five steps in three windows, two checkpoints, a restart that fell back."""
    run = RunDir(tmp_path / "run")
    write_tiny_record(run, {}, STREAM)
    write_tiny_shards(run, tiny_spec(), range(6))
    append(run, Resume(0, 1), window(0, 1), Save(2), window(2, 3))
    append(run, Resume(2, 1), window(2, 2), window(3, 4), Save(5, checkpoints=(2, 5)))
    write_checkpoint(run, 2)
    write_checkpoint(run, 5)
    return run


def test_a_whole_run(run):
    found = audit(run)
    assert found["ok"] is True
    assert (found["shards"], found["samples"], found["consumed_steps"]) == (6, 24, 5)
    assert found["missing"] == found["duplicate"] == found["corrupt"] == []
    assert found["checkpoints"] == {"verified": [2, 5], "kept": [], "teacher": [], "bad": []}
    assert found["consumed_sha256"] == window(0, 4).ids_sha256
    json.dumps(found)


def test_a_run_that_has_not_begun(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(ConfigError, match=r"it has no run\.json"):
        audit(run)
    write_tiny_record(run, {}, STREAM)
    found = audit(run)
    assert found["ok"] and found["shards"] == found["consumed_steps"] == 0


def test_missing_shard(run):
    """Five steps need three blocks, that is shards 0-5."""
    for path in (run.tar(4), run.sidecar(4)):
        path.unlink()
    found = audit(run)
    assert not found["ok"] and found["missing"] == [{"shard": 4, "first_id": 16, "last_id": 19}]


def test_a_shard_that_was_not_needed_yet_is_not_missing(run):
    write_tiny_shards(run, tiny_spec(), [7])  # 6 is in the making
    assert audit(run)["ok"]


def test_a_shard_that_was_made_and_is_gone_is_missing_though_no_step_needed_it_yet(run):
    """As of a run that only generates: its shards are all it has."""
    for shard in range(10):
        append(run, made(shard))
    append(run, Quarantine(9))
    found = audit(run)
    assert [entry["shard"] for entry in found["missing"]] == [6, 7, 8] and not found["ok"]
    write_tiny_shards(run, tiny_spec(), range(6, 9))
    assert audit(run)["ok"]


def test_quarantine_is_a_loss_only_until_it_is_made_good(run):
    open_store(run).quarantine(1, "a flipped byte", open_store(run).mark(1))
    found = audit(run)
    assert [entry["shard"] for entry in found["missing"]] == [1]
    write_tiny_shards(run, tiny_spec(), [1])
    found = audit(run)
    assert found["ok"] and len(found["quarantined"]) == 1


def test_an_evicted_shard_is_proven_by_its_sidecar_and_the_events(run):
    """Checkpoint 2 is the oldest; it stands at the second block, shards 2 and 3."""
    digest = audit(run)["consumed_sha256"]
    evict(run, (0, 1), step=2)
    assert not run.tar(0).exists() and run.sidecar(0).exists()
    found = audit(run)
    assert found["ok"], found
    assert (found["shards"], found["samples"], found["evicted"]) == (6, 24, 2)
    assert found["consumed_sha256"] == digest


def test_a_shard_that_a_checkpoint_reads_must_not_be_evicted(run):
    evict(run, (0, 1, 2), step=2)
    found = audit(run)
    assert not found["ok"] and [entry["shard"] for entry in found["corrupt"]] == [2]
    assert "a checkpoint reads it" in found["corrupt"][0]["problem"]


def test_an_eviction_without_event_or_sidecar_is_a_loss(run):
    evict(run, (0, 1), step=2)
    run.sidecar(1).unlink()
    found = audit(run)
    assert not found["ok"] and [entry["shard"] for entry in found["missing"]] == [1]
    run.events.write_text("".join(line for line in run.events.open() if '"evict"' not in line))
    found = audit(run)
    assert "no event says so" in found["corrupt"][0]["problem"]


def test_a_sidecar_of_an_evicted_shard_is_checked(run):
    evict(run, (0, 1), step=2)
    text = run.sidecar(1).read_text()
    run.sidecar(1).write_text(text.replace('"nfe": 4', '"nfe": 5'))
    assert [entry["shard"] for entry in audit(run)["corrupt"]] == [1]


@pytest.mark.parametrize("damage", ["flip", "cut", "sidecar", "no tar"])
def test_corrupt_shard(run, damage):
    path = run.sidecar(2) if damage == "sidecar" else run.tar(2)
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    if damage == "no tar":
        path.unlink()
    else:
        path.write_bytes(content[:2048] if damage == "cut" else content)
    found = audit(run)
    assert not found["ok"] and found["shards"] == 5 and found["missing"] == []
    assert [entry["shard"] for entry in found["corrupt"]] == [2]


def test_copied_shard_is_a_duplicate(run):
    for path in (RunDir.tar, RunDir.sidecar):
        shutil.copy(path(run, 2), path(run, 8))
    found = audit(run)
    assert not found["ok"]
    assert found["duplicate"] == [{"shards": [2, 8], "first_id": 8, "last_id": 11}]


@pytest.mark.parametrize("other", [{"grid": 4}, {"seed": 4}])
def test_shard_of_another_run(run, other):
    for path in (run.tar(3), run.sidecar(3)):
        path.unlink()
    write_tiny_shards(run, tiny_spec(**other), [3])
    found = audit(run)
    assert not found["ok"] and [entry["shard"] for entry in found["corrupt"]] == [3]
    assert next(iter(other)).replace("grid", "times") in found["corrupt"][0]["problem"]


def test_teachers_of_run_json_count(run):
    write_tiny_record(run, {}, STREAM, teacher0=64 * "0", teacher1=64 * "1")
    assert audit(run)["ok"]
    write_tiny_record(run, {}, STREAM, teacher0=64 * "0", teacher1=64 * "2")
    assert len(audit(run)["corrupt"]) == 6


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (window(6, 7), "steps 6-7 came after 5 steps"),
        (window(4, 5), "steps 4-5 came after 5 steps"),
        (Resume(6, 1), "resumed at step 6 after only 5 steps"),
        (Steps(5, 6, "0"), "steps 5-6 read other samples than planned"),
    ],
)
def test_consumption_that_differs_from_the_plan(run, event, sentence):
    append(run, event)
    found = audit(run)
    assert not found["ok"] and found["consumption"] == [sentence]


def test_bad_checkpoint(run):
    os.truncate(run.checkpoints / "step_00000005" / "rank_00000.safetensors", 3)
    found = audit(run)
    assert not found["ok"] and found["checkpoints"]["verified"] == [2]
    assert found["checkpoints"]["bad"][0]["step"] == 5


def test_a_checkpoint_kept_for_good_is_checked_too(run):
    kept = run.checkpoints / KEPT
    kept.mkdir()
    (run.checkpoints / "step_00000002").rename(kept / "step_00000002")
    assert audit(run)["checkpoints"] == {"verified": [5], "kept": [2], "teacher": [], "bad": []}
    os.truncate(kept / "step_00000002" / "rank_00000.safetensors", 3)
    found = audit(run)
    assert not found["ok"] and found["checkpoints"]["bad"][0]["step"] == 2


def test_what_is_only_told(run):
    append(run, made(1), Quarantine(1), made(1), MakeAgain((1,)), made(1))
    assert audit(run)["produced_again"] == []
    append(run, made(1))
    (run.shards / "00000009.tar").write_bytes(b"killed before the sidecar")
    (run.shards / ".00000010.tar.tmp-host-1-00000000").write_bytes(b"killed while writing")
    found = audit(run)
    assert found["ok"] and found["produced_again"] == [1] and found["orphans"] == ["00000009.tar"]


def test_lines_of_another_version_are_told_and_break_nothing(run):
    with run.events.open("a") as file:
        file.write('{"time": 1.0, "kind": "dance"}\n{"time": 1.0, "kind": "sca\n')
    found = audit(run)
    assert found["ok"] and found["events"] == [
        "events.jsonl line 9: kind 'dance' is not known; a newer version may know it",
        "events.jsonl line 10: no JSON object, as a crash leaves it",
    ]


def test_a_window_of_steps_that_cannot_be_read_is_a_gap(run):
    with run.events.open("a") as file:
        file.write('{"time": 1.0, "kind": "steps", "first": 5, "last": 6}\n')
    append(run, window(7, 8))
    found = audit(run)
    assert not found["ok"] and found["consumption"] == ["steps 7-8 came after 5 steps"]
    assert found["events"] == [
        "events.jsonl line 9: steps lacks the field 'ids_sha256'; the line counts for nothing"
    ]


def test_audit_needs_no_torch():
    heavy = "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    code = f"import sys, cluster.inspect.verify; {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


# -----------------------------------------------------------------------------------------------
# Records against each other


def test_a_checkpoint_newer_than_the_events_is_a_finding(run):
    lines = run.events.read_text().splitlines(keepends=True)
    run.events.write_text("".join(lines[:-2] + lines[-1:]))  # the window of steps 3 and 4
    found = audit(run)
    assert not found["ok"] and found["consumption"] == []
    assert found["records"] == [
        "there is a checkpoint of step 5, and run/events.jsonl tells of 3 steps: records are "
        "missing or cut"
    ]
    run.events.unlink()
    assert not audit(run)["ok"]


def test_a_save_without_its_checkpoint_is_a_finding_whichever_it_is(run):
    shutil.rmtree(run.checkpoints / "step_00000002")
    gone = "run/events.jsonl tells of a checkpoint of step {}, which is not there"
    assert audit(run)["records"] == [gone.format(2)]
    append(run, Save(6, checkpoints=(5, 6)))  # as one that has taken it away
    assert audit(run)["records"] == [gone.format(6)]
    append(run, Resume(5, 1))  # it fell back behind it since
    assert audit(run)["ok"]
    shutil.rmtree(run.checkpoints / "step_00000005")
    assert audit(run)["records"] == [gone.format(5)]


def test_a_checkpoint_of_which_no_save_and_no_start_tells_is_a_finding(run, write_checkpoint):
    write_checkpoint(run, 4)
    (run.checkpoints / KEPT).mkdir()
    (run.checkpoints / "step_00000004").rename(run.checkpoints / KEPT / "step_00000004")
    assert audit(run)["records"] == [
        "run/events.jsonl does not tell of the checkpoints of steps 4: lines are missing or cut (a "
        "kill between a save and its line is made good by the next start)"
    ]


def test_a_kill_between_a_save_and_its_line_is_made_good_by_the_next_start(run, write_checkpoint):
    """It has taken an older one away, and no line says so. A live run is about to say it."""
    write_checkpoint(run, 6)
    shutil.rmtree(run.checkpoints / "step_00000002")
    append(run, window(5, 5))
    with held(run):
        assert audit(run)["ok"]
    found = audit(run)["records"]
    assert len(found) == 2 and "of step 2, which" in found[0] and "of steps 6:" in found[1]
    append(run, Resume(6, 1))
    assert audit(run)["ok"]


def test_the_checkpoints_of_the_runs_own_teacher_are_compared_with_its_own_events(
    run, write_checkpoint
):
    write_checkpoint(run.teacher, 3)
    append(run.teacher, Resume(0, 1), Steps(0, 2, "0" * 64))
    assert "teacher/events.jsonl does not tell of" in audit(run)["records"][0]
    append(run.teacher, Save(3))
    assert audit(run)["ok"]
    shutil.rmtree(run.teacher.checkpoints)
    assert "teacher/events.jsonl tells of a checkpoint of step 3" in audit(run)["records"][0]


def test_a_line_that_was_changed_is_a_finding_and_one_that_a_crash_cut_is_told(run):
    lines = run.events.read_bytes().splitlines(keepends=True)
    append(run, window(5, 6))
    whole = run.events.read_bytes()
    run.events.write_bytes(whole.replace(b'"kind": "save"', b'"kind"; "save"'))
    assert audit(run)["records"][:1] == [
        f"run/events.jsonl line {len(lines[:3])} was changed: it is whole, and no JSON object"
    ]
    run.events.write_bytes(whole[:-7])
    found = audit(run)
    assert found["ok"] and found["events"] == [
        "events.jsonl line 9: no JSON object, as a crash leaves it"
    ]


FINISHED = Path(__file__).parents[2] / "fixtures" / "run-0.1"
PARTS = (
    "shards/*.json",
    "shards/*.tar",
    "checkpoints/*/rank_*",
    "checkpoints/*/MANIFEST.json",
    "events.jsonl",
    "cursor.json",
    "config.yaml",
    "checkpoints/latest",
)


@pytest.fixture
def finished(tmp_path, monkeypatch) -> RunDir:
    """A real run that has ended, with the seals of this version."""
    monkeypatch.setattr(files, "LOOKS", 0)
    run = RunDir(tmp_path / "finished")
    shutil.copytree(FINISHED, run.root)
    save_config(run, load_config(run))
    (folder,) = committed_steps(run.checkpoints).values()
    write_manifest(folder, read_manifest(folder))
    assert audit(run)["ok"]
    return run


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_byte_anywhere_is_seen_or_costs_nothing(finished, part):
    clean, odd = audit(finished), random.Random(part)
    for _ in range(6):
        path = odd.choice(sorted(finished.root.glob(part)))
        content = path.read_bytes()
        changed = bytearray(content)
        changed[odd.randrange(len(content))] ^= odd.randrange(1, 256)
        path.write_bytes(changed)
        found = audit(finished)
        assert not found["ok"] or found["events"] or found == clean
        if part not in ("events.jsonl", "cursor.json", "checkpoints/latest"):
            assert not found["ok"] or found["events"]
        with suppress(ConfigError):  # a sentence
            status(finished)
        path.write_bytes(content)
    assert audit(finished) == clean


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seed: 0", "seed: 1", "config.yaml differs from run.json: seed: the run has 0, asked"),
        ("seed: 0", "seed: [", "config.yaml cannot be read"),
        ("\nseed: 0", "\nsead: 0", "sead"),
    ],
)
def test_settings_that_are_not_those_of_run_json_are_a_finding(finished, old, new, sentence):
    text = finished.config.read_text()
    assert old in text
    finished.config.write_text(text.replace(old, new))
    found = audit(finished)
    assert not found["ok"] and sentence in found["records"][0]
    assert found["events"] == ["config.yaml was edited since the last start wrote it"]
