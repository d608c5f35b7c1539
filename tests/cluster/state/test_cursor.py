"""cursor.json steers teachers and proves nothing: whatever stands in it, the run goes on."""

import json

import pytest

from cluster.state import cursor
from distill.run.files import RunDir

KNOWN = cursor.Position(7, "known")
OTHER = {
    "binary": b"\xff\xfe\x00",
    "empty": b"",
    "half": b'{"block": 1',
    "list": b"[1]",
    "deep": b"[" * 99999,
    "text": b'{"block": "1", "waiting_for": ""}',
    "bool": b'{"block": true, "waiting_for": ""}',
    "fraction": b'{"block": 1.5, "waiting_for": ""}',
    "none": b'{"block": null, "waiting_for": ""}',
    "negative": b'{"block": -1, "waiting_for": ""}',
    "long": b'{"block": ' + b"9" * 9999 + b', "waiting_for": ""}',
    "nan": b'{"block": NaN, "waiting_for": ""}',
    "lacks": b'{"block": 1}',
    "more": b'{"block": 1, "waiting_for": "", "x": 1}',
    "words": b'{"block": 1, "waiting_for": 2}',
}


@pytest.mark.parametrize("content", OTHER.values(), ids=OTHER)
def test_what_is_no_position_leaves_what_is_known(tmp_path, content):
    run = RunDir(tmp_path)
    run.cursor.write_bytes(content)
    assert cursor.read_cursor(run, KNOWN) == KNOWN
    assert cursor.read_cursor(run) == cursor.START


def test_what_cannot_be_opened_leaves_what_is_known(tmp_path):
    run = RunDir(tmp_path)
    assert cursor.read_cursor(run, KNOWN) == KNOWN
    run.cursor.mkdir()
    assert cursor.read_cursor(run, KNOWN) == KNOWN


def test_words_are_a_line_that_can_be_shown(tmp_path):
    run = RunDir(tmp_path)
    run.cursor.write_text(json.dumps({"block": 2, "waiting_for": "a\x1b[2J\nb" + "c" * 10**6}))
    found = cursor.read_cursor(run, KNOWN)
    assert found.block == 2
    assert found.waiting_for.startswith("a[2Jbccc") and len(found.waiting_for) <= cursor.LONGEST
