"""A JSON object as a frozen dataclass, and back. Standard library only.

The keys are the names of the fields, in their order. A field with a default is one that older
versions did not write; the default stands at the field. Where that is None, None is not written.
What an object lacks, or has too many of, is a sentence that names the field.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from distill.run import files

T = TypeVar("T")
Tree = dict[str, Any]
REST = {"rest": True}  # metadata of a field that `rest` made

PLAIN = {int: "whole number", str: "text", list: "list", dict: "object"}


class RecordError(ValueError):
    """An object that is not the record. The message goes on a sentence that begins with its place:
    "lacks the field 'workers'".
    """


class NewerRecord(RecordError):
    """A record whole and right, but for a field that this version does not know."""


def now() -> float:
    """Unix time in seconds, to the millisecond."""
    return round(time.time(), 3)


@dataclass(frozen=True)
class Stamped:
    """A line of a log.

    Attributes:
        time: Unix time in seconds; that of its making unless it is given. One that is read has it.
    """

    time: float = field(default_factory=now, kw_only=True)


def rest() -> Any:
    """A field, a dictionary, that takes every key that is no field."""
    return field(default_factory=dict, metadata=REST)


# -----------------------------------------------------------------------------------------------
# Write


def tree_of(record: Any) -> Tree:
    """The JSON object of a record: its fields in order."""
    tree: Tree = {}
    for one in fields(record):
        value = getattr(record, one.name)
        if one.metadata == REST:
            tree |= value
        elif value is not None or one.default is not None:
            tree[one.name] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return tree_of(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


# -----------------------------------------------------------------------------------------------
# Read


def tree_sha256(tree: Tree) -> str:
    """Hexadecimal sha256 of an object as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def record_of(kind: type[T], tree: Any) -> T:
    """The record in a JSON object.

    Raises:
        NewerRecord: it is one, and has more fields, here or in a part of it.
        RecordError: it is none.
    """
    try:
        found: T = _reader(kind)(tree)  # type: ignore[arg-type]
    except _Wrong as error:
        raise RecordError(f"is no {error}") from error
    return found


def parse_record(kind: type[T], data: bytes | str) -> T:
    """The record in a file's content; raises as `record_of`."""
    return record_of(kind, parse_json(data))


def parse_json(data: bytes | str) -> Any:
    """What a file's content says as JSON; RecordError where it says nothing."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is no JSON ({error})") from error


def read_record(kind: type[T], path: Path) -> T:
    """The record in a file.

    Raises:
        FileNotFoundError: there is none.
        NewerRecord, RecordError: as `record_of`; the message begins with the file.
    """
    data = files.read_bytes(path)
    try:
        return parse_record(kind, data)
    except RecordError as error:
        raise type(error)(f"{path} {error}") from error


def known_part(kind: type, tree: Tree) -> Tree:
    """`tree` without the fields that `kind` does not have."""
    return {one.name: tree[one.name] for one in fields(kind) if one.name in tree}


class _Wrong(Exception):
    """A value is not of its type. The message says what it should be."""


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Makes a value of type `kind` from JSON; raises _Wrong, or RecordError below a dataclass."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _record_reader(kind)
    origin, args = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return lambda value: value
    if kind is float:
        return _number
    if origin in (Union, UnionType):
        (inner,) = (_reader(arg) for arg in args if arg is not NoneType)
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        inner = _reader(args[0])
        return lambda value: tuple(inner(item) for item in _of_kind(list, value))
    if origin is dict:
        inner = _reader(args[1])
        return lambda value: {key: inner(item) for key, item in _of_kind(dict, value).items()}
    return partial(_of_kind, origin)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise _Wrong("number")
    return float(value)


def _of_kind(kind: type, value: Any) -> Any:
    """`value`, which must be of just that type: a bool is no whole number."""
    if type(value) is not kind:
        raise _Wrong(PLAIN[kind])
    return value


def _record_reader(kind: type) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    parts = [
        (f.name, hints[f.name], _reader(hints[f.name]), _default(f))
        for f in fields(kind)
        if f.metadata != REST
    ]
    others = [
        (f.name, _reader(get_args(hints[f.name])[1])) for f in fields(kind) if f.metadata == REST
    ]

    def read(tree: Any) -> Any:
        _of_kind(dict, tree)
        values = {}
        for name, hint, inner, default in parts:
            if name in tree:
                value = tree[name]
                # The usual case at once: a log has a hundred thousand lines.
                values[name] = value if type(value) is hint else _part(inner, name, value)
            elif default is MISSING:
                raise RecordError(f"lacks the field {name!r}")
        for name, inner in others:
            more = [key for key in tree if key not in values]
            values[name] = {key: _part(inner, key, tree[key]) for key in more}
        if not others and len(values) < len(tree):
            raise NewerRecord(f"has the field {min(tree.keys() - values)!r}, which is not known")
        return kind(**values)

    return read


def _part(inner: Callable[[Any], Any], name: str, value: Any) -> Any:
    """The value of a field; raises RecordError."""
    try:
        return inner(value)
    except _Wrong as error:
        said = f"{json.dumps(value):.60}"
        raise RecordError(f"says {name}={said}, which is no {error}") from error
    except RecordError as error:
        raise type(error)(f"{error} in {name!r}") from error


def _default(one: Any) -> Any:
    """MISSING where a record that is read must have the field."""
    if one.default_factory in (MISSING, now):
        return one.default
    return one.default_factory
