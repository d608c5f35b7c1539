"""What a run is: the settings that determine its data and weights. A resume that differs is refused
with a diff.

Not part of it are the settings that `distill.config.free` marks: where and how fast things run,
what is printed or kept, the evaluation, and `train.max_steps`, so a run can be trained further.

Settings come and go between versions. One that a run lacks counts as its default, or what
`distill.config.since` says, so that nothing changes; one that is no more is named with what to do
(`cluster.settings.file.REMOVED`).
"""

import platform
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omegaconf import OmegaConf

from cluster.plan.stream import stream_of
from cluster.settings import file, schema
from distill.checkpoint.manifest import KEPT, committed_steps
from distill.config import ConfigError, before, is_free
from distill.data.stores.store import open_store
from distill.objectives.config import name_now
from distill.run import events, files, identity as run_json

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

# -----------------------------------------------------------------------------------------------
# The settings that count


def identity_of(config: schema.RunConfig) -> dict[str, Any]:
    """The settings that determine data and weights, as plain nested values.

    A teacher of this run's own pre-training is named by its path inside the run, so a run can be
    moved. Another one is named by the fingerprint of its weights, which `record_teachers` compares.
    """
    values = OmegaConf.to_container(file.to_tree(config), resolve=True)
    assert isinstance(values, dict)
    identity, own = _bound(config, values, ""), False
    for name, teacher in config.teacher.items():
        # The first version wrote a SiT's heads for every kind; hashes of runs contain them.
        identity["teacher"][name].setdefault("num_heads", 0)
        if schema.is_own(teacher.path, config.run.dir):
            own = True
            inside = teacher.path[len(config.run.dir.rstrip("/")) + 1 :]
            identity["teacher"][name]["path"] = inside
        elif not teacher.may_be_name:
            del identity["teacher"][name]["path"]
    if not own:
        del identity["pretrain"]
    return identity


def _bound(settings: Any, values: dict[Any, Any], section: str) -> dict[str, Any]:
    """`values` of a settings dataclass without those of its free fields."""
    found: dict[str, Any] = {}
    for one in fields(settings):
        if is_free(one, section):
            continue
        value, part = values[one.name], getattr(settings, one.name)
        inner = f"{section}.{one.name}" if section else one.name
        if is_dataclass(part):
            value = _bound(part, value, inner)
        elif isinstance(part, dict):
            value = {key: _bound(each, value[key], f"{inner}.{key}") for key, each in part.items()}
        found[one.name] = value
    return found


def completed(stored: dict[str, Any], asked: dict[str, Any], settings: Any) -> dict[str, Any]:
    """`stored` with a value for every setting in `asked` that was not there when it was written.

    `asked` is of the dataclass `settings`. A part of another kind has other settings: it gets none.
    """
    found = dict(stored)
    for one in fields(settings):
        if one.name not in asked:
            continue
        value, part, old = asked[one.name], getattr(settings, one.name), stored.get(one.name)
        if is_dataclass(part):
            if _is_same_kind(old or {}, value):
                found[one.name] = completed(old or {}, value, part)
        elif isinstance(part, dict):
            found[one.name] = {
                key: completed(each, value[key], part[key])
                if key in part and _is_same_kind(each, value[key])
                else each
                for key, each in (old or {}).items()
            }
        elif one.name not in stored and (was := before(one)) is not MISSING:
            found[one.name] = was
    return found


def _is_same_kind(stored: dict[str, Any], asked: dict[str, Any]) -> bool:
    return all(stored.get(key) == asked.get(key) for key in ("name", "kind"))


# -----------------------------------------------------------------------------------------------
# Comparison


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def difference(stored: dict[str, Any], asked: dict[str, Any], settings: Any) -> list[str]:
    """One line per setting that differs: "train.lr: the run has 0.001, asked for 0.002".

    `asked` is of the dataclass `settings`.
    """
    if "name" in stored.get("objective", {}):
        objective = stored["objective"]
        stored = stored | {"objective": objective | {"name": name_now(objective)}}
    written, new = flatten(stored), flatten(asked)
    old = flatten(completed(stored, asked, settings))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key not in old:
            lines.append(f"{key}: the run has none, asked for {new[key]}")
        elif key not in new:
            lines.append(f"{key}: the run has {old[key]}, {file.removed(key) or 'asked for none'}")
        elif old[key] != new[key]:
            was = "" if key in written else ", since it is older than this setting"
            lines.append(f"{key}: the run has {old[key]}{was}, asked for {new[key]}")
    return lines


def has_work(run: files.RunDir) -> bool:
    """Whether anything was made in a run: a shard, a step, a step of its own teacher."""
    old = replace(run, location=file.shard_location(run))  # where its shards lie so far
    found = open_store(old).listing()
    return bool(
        found.committed
        or found.without_tar
        or committed_steps(run.checkpoints)
        or committed_steps(run.checkpoints / KEPT)
        or committed_steps(run.teacher.checkpoints)
        or any(isinstance(one, events.Steps) for one in events.read_history(run).course)
    )


def check_identity(config: schema.RunConfig, run: files.RunDir) -> run_json.RunRecord | None:
    """run.json, or None for a new run, or one without a step or a shard: it may become another one.
    Writes nothing.

    Raises:
        ConfigError: the configuration is another run's (with a diff), or run.json is corrupt or
            of a newer version.
    """
    record = run_json.read_record(run)
    lines = difference(record.identity, identity_of(config), config) if record else []
    if record and lines and not (run_json.newer(record.versions) or has_work(run)):
        return None
    if record and lines:
        raise ConfigError(
            f"{run.root} was started with other settings{run_json.newer(record.versions)}:\n  "
            + "\n  ".join(lines)
            + f"\nResume it with its own settings (bowstring run {run.root}), or start a new run "
            "with --force-new NAME, a name that is not taken"
        )
    return record


# -----------------------------------------------------------------------------------------------
# The record


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


def new_record(config: schema.RunConfig) -> run_json.RunRecord:
    """The content of a new run.json."""
    identity = identity_of(config)
    return run_json.RunRecord(
        format=run_json.FORMAT,
        hash=run_json.hash_of(identity),
        seed=config.seed,
        identity=identity,
        stream=stream_of(config),
        schedule=(run_json.ScheduleRecord(config.train.max_steps, config.train.decay),),
        teachers={},
        versions=versions(),
    )


def check_or_write(
    config: schema.RunConfig, run: files.RunDir
) -> tuple[run_json.RunRecord, list[str]]:
    """run.json, after it was written for a new run or compared with an old one, and notes for the
    user.

    Raises:
        ConfigError: as `check_identity`, or run.json cannot be written.
    """
    record = check_identity(config, run)
    if record is not None:
        return _with_schedule(config, run, record)
    record = new_record(config)
    run_json.write_record(run, record)
    return record, []


def _with_schedule(
    config: schema.RunConfig, run: files.RunDir, record: run_json.RunRecord
) -> tuple[run_json.RunRecord, list[str]]:
    """Writes a changed train.max_steps into run.json, and says what it means."""
    last = record.schedule[-1].max_steps if record.schedule else None
    steps = config.train.max_steps
    if last == steps:
        return record, []
    entry = run_json.ScheduleRecord(steps, config.train.decay)
    record = replace(record, schedule=(*record.schedule, entry))
    run_json.write_record(run, record)
    note = f"train.max_steps changed from {last} to {steps}"
    if config.train.decay == "cosine":
        note += (
            "; the cosine decay is stretched from here on, so the weights differ from those of one "
            "run of that length"
        )
    return record, [note]


def record_trials(
    run: files.RunDir, trials: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Those of `trials`, of teachers by name, that run.json had not, and has now."""
    if not trials:
        return {}
    record = run_json.record_of(run)
    new = {name: trial for name, trial in trials.items() if name not in record.trials}
    if new:
        run_json.write_record(run, replace(record, trials=record.trials | new))
    return new


def record_teachers(
    run: files.RunDir, record: run_json.RunRecord, fingerprints: dict[str, str]
) -> None:
    """Writes the fingerprints of the teachers' weights into run.json, which holds `record`, or
    compares them with those there.

    Raises:
        ConfigError: a teacher's weights are not those the run was started with.
    """
    known = record.teachers
    for name, fingerprint in fingerprints.items():
        if known.get(name, fingerprint) != fingerprint:
            raise ConfigError(
                f"teacher.{name} has other weights (sha256 {fingerprint[:12]}) than the run "
                f"{run.root} was started with ({known[name][:12]}); put the old file back, or "
                "start a new run with --force-new NAME"
            )
    if not fingerprints.keys() <= known.keys():
        run_json.write_record(run, replace(record, teachers=known | fingerprints))
