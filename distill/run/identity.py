"""run.json: what determines the data and the weights of a run, typed. No torch.

`format` says who can read the file. It is raised only when an older version would misread it, so a
version reads its own format, and refuses a higher one with both versions. Within a format settings
come and go: see `cluster.state.identity`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from packaging.version import InvalidVersion, Version

from distill.config import ConfigError
from distill.run.dir import RunDir
from distill.run.files import write_json

FORMAT = 1

T = TypeVar("T")


@dataclass(frozen=True)
class StreamRecord:
    """What the reading order follows from."""

    seed: int
    samples_per_shard: int
    block_shards: int
    passes: int
    batch_size: int


@dataclass(frozen=True)
class ScheduleRecord:
    """How long a start was to train, and how its learning rate falls."""

    max_steps: int
    decay: str


@dataclass(frozen=True)
class RunRecord:
    """run.json.

    Attributes:
        hash: `hash_of(identity)`, and no other.
        identity: the settings that determine data and weights, as plain nested values.
        schedule: one entry per change of train.max_steps.
        teachers: name -> sha256 of the weights, once known.
        versions: of the packages that made the run, by name.
    """

    format: int
    hash: str
    seed: int
    identity: dict[str, Any]
    stream: StreamRecord
    schedule: tuple[ScheduleRecord, ...]
    teachers: dict[str, str]
    versions: dict[str, str]


def hash_of(identity: dict[str, Any]) -> str:
    """Hexadecimal sha256 of the identity as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------------------------
# Read and write


def read_record(run: RunDir) -> RunRecord | None:
    """run.json, or None when there is none.

    Raises:
        ConfigError: a newer version wrote it, or it is corrupt. It stays as it is.
    """
    try:
        content = run.identity.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {run.identity}: {error.strerror}") from error
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise _corrupt(run.identity, str(error)) from error
    if not isinstance(tree, dict):
        raise _corrupt(run.identity, "it must be an object")
    found, versions = tree.get("format"), tree.get("versions")
    if isinstance(found, int) and found > FORMAT:
        raise ConfigError(
            f"{run.root} was written by bowstring {_bowstring(versions)} (run.json format {found}),"
            f" this is {version('bowstring')}, which reads format {FORMAT}: install that version "
            "to go on with the run, or start a new one with --force-new NAME"
        )
    try:
        record = _parse(tree)
    except ValueError as error:
        raise _corrupt(run.identity, f"{error}{newer(versions)}") from error
    if record.hash != hash_of(record.identity):
        raise _corrupt(run.identity, "its hash does not match its content")
    return record


def newer(versions: Any) -> str:
    """The versions of a run and of this program in words, if the run's is later; "" otherwise."""
    theirs, ours = _bowstring(versions), version("bowstring")
    try:
        is_later = Version(theirs) > Version(ours)
    except InvalidVersion:
        return ""
    return f"; it was written by bowstring {theirs}, and this is {ours}" if is_later else ""


def _bowstring(versions: Any) -> str:
    return str(versions.get("bowstring", "?")) if isinstance(versions, dict) else "?"


def record_of(run: RunDir) -> RunRecord:
    """run.json of a run that was started; raises ConfigError as `read_record`, or if it was not."""
    record = read_record(run)
    if record is None:
        raise ConfigError(f"{run.root} is no run: it has no {run.identity.name}")
    return record


def write_record(run: RunDir, record: RunRecord) -> None:
    """Writes run.json, atomically.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_json(run.identity, asdict(record))
    except OSError as error:
        raise ConfigError(
            f"cannot write {run.identity}: {error.strerror}; choose another place with run.dir=..."
        ) from error


def _corrupt(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is corrupt ({reason}) and was left as it is; put back a copy, or move it away to "
        "have it written again, or take another run with --force-new NAME"
    )


def _parse(tree: Any) -> RunRecord:
    """The record in a JSON value; raises ValueError with a reason that names the field."""
    values = _fields(RunRecord, tree, "it")
    values["stream"] = StreamRecord(**_fields(StreamRecord, values["stream"], "stream"))
    if not isinstance(values["schedule"], list):
        _refuse("schedule", values["schedule"])
    entries = [_fields(ScheduleRecord, entry, "schedule") for entry in values["schedule"]]
    values["schedule"] = tuple(ScheduleRecord(**entry) for entry in entries)
    for name in ("identity", "teachers", "versions"):
        if not isinstance(values[name], dict):
            _refuse(name, values[name])
    return RunRecord(**values)


def _fields(kind: type, tree: Any, where: str) -> dict[str, Any]:
    """The values of a dataclass by name, after the names and the simple ones were checked."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must be an object")
    types = {one.name: one.type for one in fields(kind)}
    if missing := types.keys() - tree.keys():
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := tree.keys() - types.keys():
        raise ValueError(f"{where} has unknown {', '.join(sorted(unknown))}")
    for name, wanted in (("int", int), ("str", str)):
        for key in types:
            if types[key] == name and type(tree[key]) is not wanted:
                _refuse(key, tree[key])
    return dict(tree)


def _refuse(key: str, value: Any) -> NoReturn:
    raise ValueError(f"{key} cannot be {json.dumps(value):.40}")
