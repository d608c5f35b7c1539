"""run.json: what determines the data and the weights of a run. A resume that differs is refused
with a diff.

Not part of it: where and how fast things run (cluster, run, ZeRO stage, micro-batch), what is
printed or kept, the evaluation, and `train.max_steps`, so a run can be trained further. With cosine
decay a longer run has another learning rate from the step where it is resumed; the weights are then
not those of one uninterrupted run. That is allowed, said at the start, and written down under
"schedule".
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cluster.settings.schema import RunConfig, is_own
from distill.config import ConfigError
from distill.run.dir import RunDir
from distill.run.files import write_json

FORMAT = 1
PACKAGES = (
    "bowstring",
    "torch",
    "deepspeed",
    "ray",
    "webdataset",
    "numpy",
    "torch-fidelity",
    "hydra-core",
)
TRAIN_LEFT_OUT = (
    "log_every",
    "save_every",
    "keep_last",
    "keep_every",
    "zero_stage",
    "offload",
    "micro_batch",
    "activation_checkpointing",
    "compile",
    "save_async",
    "wandb",
    "profile",
)
TRAJECTORY_LEFT_OUT = ("location", "ready_ahead", "max_bytes", "wait_timeout_s")


def _values(settings: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a settings dataclass as plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(settings), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in without}


def identity_of(config: RunConfig) -> dict[str, Any]:
    """The settings that determine data and weights, as plain nested values.

    A teacher of this run's own pre-training is named by its path inside the run, so a run can be
    moved. Another one is named by the fingerprint of its weights, which `record_teachers` compares.
    """
    teachers = {}
    for name, teacher in config.teacher.items():
        # The first version wrote a SiT's heads for every kind; hashes of runs contain them.
        teachers[name] = _values(teacher)
        teachers[name].setdefault("num_heads", 0)
        if is_own(teacher.path, config.run.dir):
            teachers[name]["path"] = teacher.path[len(config.run.dir.rstrip("/")) + 1 :]
        elif not teacher.may_be_name:
            del teachers[name]["path"]
    identity = {
        "seed": config.seed,
        "data": _values(config.data, ("path",)),
        "student": _values(config.student),
        "teacher": teachers,
        "trajectory": _values(config.trajectory, TRAJECTORY_LEFT_OUT),
        "objective": _values(config.objective),
        "train": _values(config.train, (*TRAIN_LEFT_OUT, "max_steps", "label_dropout")),
    }
    if any(is_own(teacher.path, config.run.dir) for teacher in config.teacher.values()):
        identity["pretrain"] = {"train": _values(config.pretrain.train, TRAIN_LEFT_OUT)}
    return identity


def hash_of(identity: dict[str, Any]) -> str:
    """Hexadecimal sha256 of the identity as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers; absent ones are left out.
    Imports none of them.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def record_of(config: RunConfig) -> dict[str, Any]:
    """The content of a new run.json."""
    identity = identity_of(config)
    return {
        "format": FORMAT,
        "hash": hash_of(identity),
        "seed": config.seed,
        "identity": identity,
        "stream": {
            "seed": config.seed,
            "samples_per_shard": config.trajectory.samples_per_shard,
            "block_shards": config.trajectory.block_shards,
            "passes": config.trajectory.passes,
            "batch_size": config.train.batch_size,
        },
        "schedule": [{"max_steps": config.train.max_steps, "decay": config.train.decay}],
        "teachers": {},  # name -> sha256 of the weights, once known
        "versions": versions(),
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def difference(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """One line per setting that differs: "train.lr: the run has 0.001, asked for 0.002"."""
    old, new = flatten(stored), flatten(asked)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new and old[key] != new[key]:
            lines.append(f"{key}: the run has {old[key]}, asked for {new[key]}")
        elif key not in new:
            lines.append(f"{key}: the run has {old[key]}, asked for none")
        elif key not in old:
            lines.append(f"{key}: the run has none, asked for {new[key]}")
    return lines


def read_identity(run: RunDir) -> dict[str, Any] | None:
    """The content of run.json, or None when there is none.

    Raises:
        ConfigError: it is corrupt. It stays where it is; nothing overwrites it.
    """
    path = run.identity
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise _corrupt(path, str(error)) from error
    parts = ("identity", "stream", "teachers")
    if not isinstance(record, dict) or not all(
        isinstance(record.get(part), dict) for part in parts
    ):
        raise _corrupt(path, f"it must hold {', '.join(parts)}")
    if record.get("hash") != hash_of(record["identity"]):
        raise _corrupt(path, "its hash does not match its content")
    return record


def _corrupt(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is corrupt ({reason}) and was left as it is; put back a copy, or move it away to "
        "have it written again, or take another run with --force-new NAME"
    )


def check_identity(config: RunConfig, run: RunDir) -> dict[str, Any] | None:
    """run.json, or None for a new run. Writes nothing.

    Raises:
        ConfigError: the configuration is another run's (with a diff), or run.json is corrupt.
    """
    record = read_identity(run)
    lines = difference(record["identity"], identity_of(config)) if record else []
    if lines:
        raise ConfigError(
            f"{run.root} was started with other settings:\n  "
            + "\n  ".join(lines)
            + "\nResume it with its own settings, or start a new run with --force-new NAME, "
            "a name that is not taken"
        )
    return record


def check_or_write(config: RunConfig, run: RunDir) -> list[str]:
    """Notes for the user, after run.json was written for a new run or compared with an old one.

    Raises:
        ConfigError: as `check_identity`, or run.json cannot be written.
    """
    record = check_identity(config, run)
    if record is not None:
        return _note_schedule(config, run, record)
    _write(run, record_of(config))
    return []


def _note_schedule(config: RunConfig, run: RunDir, record: dict[str, Any]) -> list[str]:
    """Writes a changed train.max_steps into run.json, and says what it means."""
    schedule = record.setdefault("schedule", [])
    last = schedule[-1]["max_steps"] if schedule else None
    steps = config.train.max_steps
    if last == steps:
        return []
    schedule.append({"max_steps": steps, "decay": config.train.decay})
    _write(run, record)
    note = f"train.max_steps changed from {last} to {steps}"
    if config.train.decay == "cosine":
        note += (
            "; the cosine decay is stretched from here on, so the weights differ from those of one "
            "run of that length"
        )
    return [note]


def record_teachers(run: RunDir, fingerprints: dict[str, str]) -> None:
    """Writes the fingerprints of the teachers' weights into run.json, or compares them with those
    there.

    Raises:
        ConfigError: a teacher's weights are not those the run was started with.
    """
    record = read_identity(run)
    assert record is not None, "check_or_write comes first"
    known = record["teachers"]
    for name, fingerprint in fingerprints.items():
        if known.setdefault(name, fingerprint) != fingerprint:
            raise ConfigError(
                f"teacher.{name} has other weights (sha256 {fingerprint[:12]}) than the run "
                f"{run.root} was started with ({known[name][:12]}); put the old file back, or "
                "start a new run with --force-new NAME"
            )
    _write(run, record)


def _write(run: RunDir, record: dict[str, Any]) -> None:
    try:
        write_json(run.identity, record)
    except OSError as error:
        raise ConfigError(
            f"cannot write {run.identity}: {error.strerror}; choose another place with run.dir=..."
        ) from error
