"""run.json: what determines the data and the weights of a run, typed. No torch.

`format` says who can read the file. It is raised only when an older version would misread it, so a
version reads its own format, and refuses a higher one with both versions. Within a format settings
come and go: see `cluster.state.identity`.
"""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from distill.config import ConfigError
from distill.run import files, records

FORMAT = 1


@dataclass(frozen=True)
class StreamRecord:
    """What the reading order follows from. Runs of version 0.2 have no `spread`."""

    seed: int
    samples_per_shard: int
    block_shards: int
    passes: int
    batch_size: int
    spread: int = 1


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
        trials: name -> how its own samples bear a teacher out (`distill.teachers.trial`).
    """

    format: int
    hash: str
    seed: int
    identity: dict[str, Any]
    stream: StreamRecord
    schedule: tuple[ScheduleRecord, ...]
    teachers: dict[str, str]
    versions: dict[str, str]
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)


def hash_of(identity: dict[str, Any]) -> str:
    """Hexadecimal sha256 of the identity as JSON with sorted keys."""
    return records.tree_sha256(identity)


# -----------------------------------------------------------------------------------------------
# Read and write


def read_record(run: files.RunDir) -> RunRecord | None:
    """run.json, or None when there is none.

    Raises:
        ConfigError: a newer version wrote it, or it is corrupt. It stays as it is.
    """
    try:
        tree = files.patiently(lambda: json.loads(run.identity.read_bytes()), ValueError)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {run.identity}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
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
        record = records.record_of(RunRecord, tree)
    except records.RecordError as error:
        raise _corrupt(run.identity, f"it {error}{newer(versions)}") from error
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


def record_of(run: files.RunDir) -> RunRecord:
    """run.json of a run that was started; raises ConfigError as `read_record`, or if it was not."""
    record = read_record(run)
    if record is None:
        raise ConfigError(f"{run.root} is no run: it has no {run.identity.name}")
    return record


def write_record(run: files.RunDir, record: RunRecord) -> None:
    """Writes run.json, atomically.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        files.write_json(run.identity, records.tree_of(record))
    except OSError as error:
        raise ConfigError(
            f"cannot write {run.identity}: {error.strerror}; choose another place with run.dir=..."
        ) from error


def _corrupt(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is corrupt ({reason}) and was left as it is; put back a copy, or move it away to "
        "have it written again, or take another run with --force-new NAME"
    )
