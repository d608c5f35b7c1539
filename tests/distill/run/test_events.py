"""events.jsonl: every kind of line as it stands in the file, and what is not one of them."""

import ast
import json
import re
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from distill.run.events import (
    KINDS,
    Commit,
    EventLog,
    Evict,
    Exclude,
    Expire,
    Fail,
    Failed,
    Fallback,
    GiveUp,
    Group,
    GroupWaits,
    Init,
    Lease,
    MakeAgain,
    Pool,
    Quarantine,
    Readmit,
    Restart,
    Resume,
    Save,
    Scale,
    Spike,
    Steps,
    Unsaved,
    WandbFailed,
    WorkerJoin,
    WorkerLeave,
    append,
    read_events,
    tree_of,
)
from distill.run.files import RunDir

ROOT = Path(__file__).parents[3]
SHA = 64 * "a"

# Lines as they were written before there were classes.
LINES = [
    (Pool(2, 4), '"kind": "pool", "workers": 2, "most": 4'),
    (Pool(2, None), '"kind": "pool", "workers": 2, "most": null'),
    (Scale(3), '"kind": "scale", "workers": 3'),
    (
        WorkerJoin("n:1", {"tiny": SHA}, device="cuda"),
        '"kind": "worker_join", "device": "cuda", "worker": "n:1", '
        f'"fingerprints": {{"tiny": "{SHA}"}}',
    ),
    (Lease(7, "n:1"), '"kind": "lease", "shard": 7, "worker": "n:1"'),
    (
        Commit(7, "n:1", 1000, 2.5),
        '"kind": "commit", "shard": 7, "worker": "n:1", "bytes": 1000, "seconds": 2.5',
    ),
    (
        Commit(7, "n:1", 1000, 2.5, batch_size=8),
        '"kind": "commit", "shard": 7, "worker": "n:1", "bytes": 1000, "seconds": 2.5, '
        '"batch_size": 8',
    ),
    (Fail(7, "n:1", "no"), '"kind": "fail", "shard": 7, "worker": "n:1", "error": "no"'),
    (GiveUp(7, "3 tries"), '"kind": "give_up", "shard": 7, "reason": "3 tries"'),
    (
        Expire(None, "n:1", "late"),
        '"kind": "expire", "shard": null, "worker": "n:1", "reason": "late"',
    ),
    (Quarantine(7), '"kind": "quarantine", "shard": 7'),
    (Evict((0, 1), 4), '"kind": "evict", "shards": [0, 1], "step": 4'),
    (MakeAgain((2, 3)), '"kind": "make_again", "shards": [2, 3]'),
    (
        WorkerLeave("n:1", "end of production"),
        '"kind": "worker_leave", "worker": "n:1", "reason": "end of production"',
    ),
    (
        Exclude("node7", "GPU-1", "no driver"),
        '"kind": "exclude", "node": "node7", "gpu": "GPU-1", "reason": "no driver"',
    ),
    (Readmit("node7", ""), '"kind": "readmit", "node": "node7", "gpu": ""'),
    (Init("teacher.tiny"), '"kind": "init", "weights": "teacher.tiny"'),
    (Resume(4, 2), '"kind": "resume", "step": 4, "world_size": 2'),
    (Fallback(4, (6, 8)), '"kind": "fallback", "step": 4, "damaged": [6, 8]'),
    (Steps(0, 9, SHA), f'"kind": "steps", "first": 0, "last": 9, "ids_sha256": "{SHA}"'),
    (WandbFailed("gone"), '"kind": "wandb", "error": "gone"'),
    (
        Spike(3, 2.5, 0.5, 1, (5, 7)),
        '"kind": "spike", "step": 3, "loss": 2.5, "median": 0.5, "rank": 1, "ids": [5, 7]',
    ),
    (
        Save(4, 1000, 0.25, 0.125),
        '"kind": "save", "step": 4, "bytes": 1000, "seconds": 0.25, "stall_s": 0.125',
    ),
    (Group(2), '"kind": "group", "ranks": 2'),
    (GroupWaits(), '"kind": "group_waits"'),
    (Restart(4, "killed"), '"kind": "restart", "step": 4, "error": "killed"'),
    (Failed("full"), '"kind": "failed", "error": "full"'),
    (Unsaved("late"), '"kind": "unsaved", "error": "late"'),
]


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def said(run):
    """The events, and the sentences about the lines that are none."""
    sentences = []
    return list(read_events(run, sentences.append)), sentences


def test_every_kind_is_shown_here():
    assert {type(event) for event, _ in LINES} == set(KINDS.values())


@pytest.mark.parametrize(("event", "line"), LINES, ids=[line for _, line in LINES])
def test_an_event_is_written_as_ever_and_comes_back(run, event, line):
    event = replace(event, time=1789.125)
    append(run, event)
    assert run.events.read_text() == f'{{"time": 1789.125, {line}}}\n'
    assert said(run) == ([event], [])


def test_what_a_process_logs_stands_in_the_order_and_with_the_time_of_its_making(run):
    log = EventLog(run)
    made = [Lease(shard, "n:1") for shard in range(3)]
    for event in made:
        log.add(event)
    assert not run.events.exists()
    log.flush()
    log.flush()
    assert said(run) == (made, [])
    assert made[0].time == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    ("line", "event", "sentence"),
    [
        ('{"time": 1.0, "kind": "dance"}', None, "kind 'dance' is not known; a newer version"),
        ('{"time": 1.0}', None, "kind None is not known"),
        ('{"time": 1.0, "kind": [1]}', None, "kind [1] is not known"),
        ('{"time": 1.0, "kind": "scale"}', None, "scale lacks the field 'workers'; the line"),
        ('{"kind": "scale", "workers": 1}', None, "scale lacks the field 'time'"),
        (
            '{"time": 1.0, "kind": "scale", "workers": "3"}',
            None,
            'scale says workers="3", which is no whole number',
        ),
        ('{"time": 1.0, "kind": "scale", "workers": true}', None, "which is no whole number"),
        (
            '{"time": 1, "kind": "scale", "workers": 3, "why": "so"}',
            Scale(3, time=1.0),
            "scale has the field 'why', which is not known; its other fields are",
        ),
        ('{"time": 1.0, "kind": "sca', None, "no JSON object, as a crash leaves it"),
        ("[1]", None, "no JSON object"),
        (  # a worker of old, which computed on CPU
            '{"time": 1.0, "kind": "worker_join", "worker": "n:1", "fingerprints": {}}',
            WorkerJoin("n:1", {}, device="cpu", time=1.0),
            None,
        ),
        ('{"time": 1.0, "kind": "save", "step": 4}', Save(4, 0, 0.0, 0.0, time=1.0), None),
    ],
)
def test_a_line_of_another_version_costs_itself_only(run, line, event, sentence):
    first, last = Scale(1, time=0.0), Scale(2, time=2.0)
    append(run, first)
    with run.events.open("a") as file:
        file.write(line + "\n")
    append(run, last)
    events, sentences = said(run)
    assert events == [first, *([event] if event else []), last]
    assert len(sentences) == (sentence is not None)
    if sentence:
        assert sentences[0].startswith("events.jsonl line 2: ") and sentence in sentences[0]


def test_the_page_on_formats_lists_every_kind_with_its_fields():
    text = (ROOT / "docs" / "formats.md").read_text()
    table = text.split("## events.jsonl")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", table, re.MULTILINE)
    found = {kind: set(re.findall(r"`(\w+)`", keys)) for kind, keys in rows if kind != "kind"}
    assert found == {
        kind: {one.name for one in fields(event)} - {"time"} for kind, event in KINDS.items()
    }


def test_only_the_events_module_touches_the_file_and_names_a_kind():
    """So no line is written that is no class."""
    own = ("events.py", "dir.py")
    for path in [*(ROOT / "distill").rglob("*.py"), *(ROOT / "cluster").rglob("*.py")]:
        if path.parent.name == "run" and path.name in own:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "events":
                assert "run" not in ast.unparse(node.value), f"{path}: {ast.unparse(node)}"
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    is_kind = isinstance(key, ast.Constant) and key.value == "kind"
                    named = value.value if isinstance(value, ast.Constant) else None
                    assert not (is_kind and named in KINDS), f"{path}: {ast.unparse(node)}"


def test_a_line_is_one_json_object(run):
    append(run, *(event for event, _ in LINES))
    trees = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert trees == [json.loads(json.dumps(tree_of(event))) for event, _ in LINES]
