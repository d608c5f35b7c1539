"""JSON objects as frozen dataclasses: there and back, and a sentence for every one that is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from distill.run.records import (
    REST,
    NewerRecord,
    RecordError,
    Stamped,
    known_part,
    parse_record,
    read_record,
    record_of,
    tree_of,
)


@dataclass(frozen=True)
class Leaf:
    name: str
    size: float


@dataclass(frozen=True)
class Tree:
    count: int
    leaves: tuple[Leaf, ...]
    by_name: dict[str, Leaf]
    maybe: int | None
    anything: dict[str, Any]
    late: int | None = None  # older versions did not write it


FULL = {
    "count": 2,
    "leaves": [{"name": "a", "size": 1.5}, {"name": "b", "size": 2}],
    "by_name": {"c": {"name": "c", "size": 0.0}},
    "maybe": None,
    "anything": {"x": [1, {"y": None}]},
}


def test_there_and_back():
    found = record_of(Tree, FULL)
    assert found.leaves[1] == Leaf("b", 2.0) and found.by_name["c"].name == "c"
    assert found.maybe is None and found.late is None
    assert tree_of(found) == FULL and list(tree_of(found)) == list(FULL)
    later = record_of(Tree, FULL | {"late": 7})
    assert tree_of(later) == FULL | {"late": 7}


@dataclass(frozen=True)
class Open:
    first: int
    more: dict[str, float] = field(default_factory=dict, metadata=REST)
    last: int = 0


def test_a_record_can_take_every_key():
    tree = {"first": 1, "x": 0.5, "y": 1.0, "last": 2}
    found = record_of(Open, tree)
    assert found == Open(1, {"x": 0.5, "y": 1.0}, 2)
    assert tree_of(found) == tree and list(tree_of(found)) == list(tree)
    with pytest.raises(RecordError, match="says x="):
        record_of(Open, {"first": 1, "x": "a"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": "2"}, 'says count="2", which is no whole number'),
        ({"count": 2.0}, "says count=2.0, which is no whole number"),
        ({"count": True}, "says count=true, which is no whole number"),
        ({"leaves": {}}, "says leaves={}, which is no list"),
        ({"leaves": [1]}, "says leaves=[1], which is no object"),
        ({"leaves": [{"name": "a"}]}, "lacks the field 'size' in 'leaves'"),
        ({"by_name": {"c": {"name": 1, "size": 1}}}, "says name=1, which is no text in 'by_name'"),
        ({"anything": []}, "says anything=[], which is no object"),
        ({"late": "x" * 99}, 'says late="' + "x" * 59 + ", which is no whole number"),
    ],
)
def test_what_is_wrong_is_named(change, sentence):
    with pytest.raises(RecordError) as error:
        record_of(Tree, FULL | change)
    assert str(error.value) == sentence and not isinstance(error.value, NewerRecord)


def test_what_is_missing_or_new_is_named():
    with pytest.raises(RecordError, match="lacks the field 'maybe'"):
        record_of(Tree, {key: value for key, value in FULL.items() if key != "maybe"})
    with pytest.raises(NewerRecord, match="has the field 'colour', which is not known"):
        record_of(Tree, FULL | {"colour": "red"})
    with pytest.raises(NewerRecord, match="has the field 'x', which is not known in 'leaves'"):
        record_of(Tree, FULL | {"leaves": [{"name": "a", "size": 1, "x": 0}]})
    with pytest.raises(RecordError, match="lacks"):  # no newer record: it is none at all
        record_of(Tree, {"colour": "red"})
    assert known_part(Tree, FULL | {"colour": "red"}) == FULL


def test_a_file_is_named(tmp_path):
    path = tmp_path / "leaf.json"
    with pytest.raises(FileNotFoundError):
        read_record(Leaf, path)
    for content, sentence in (
        ("{", "is no JSON"),
        ("[]", "is no object"),
        ("{}", "lacks the field 'name'"),
        ("\xff", "is no JSON"),
    ):
        path.write_bytes(content.encode("latin1"))
        with pytest.raises(RecordError, match=f"leaf.json {sentence}"):
            read_record(Leaf, path)
    assert parse_record(Leaf, b'{"name": "a", "size": 1}') == Leaf("a", 1.0)


def test_the_time_of_a_line_is_that_of_its_making_and_is_never_made_up():
    assert Stamped().time <= Stamped().time
    assert record_of(Stamped, {"time": 5}) == Stamped(time=5.0)
    with pytest.raises(RecordError, match="lacks the field 'time'"):
        record_of(Stamped, {})
