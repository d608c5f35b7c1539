"""The configuration of a run as a file: typed settings in, config.yaml out, and back. Needs neither
torch nor hydra.
"""

import copy
import dataclasses
import difflib
import hashlib
import re
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf, errors

from cluster.settings.schema import RunConfig
from distill.config import ConfigError, check, check_choice, lacking
from distill.networks.config import NETWORKS
from distill.objectives.config import OBJECTIVES, name_now
from distill.run import files, identity
from distill.teachers.config import TEACHERS, TeacherConfig

GROUPS = ("experiment", "data", "student", "teacher", "objective", "train", "eval", "cluster")


# -----------------------------------------------------------------------------------------------
# Settings that are no more


class Removed(NamedTuple):
    """Why a run from before cannot go on as it is."""

    since: str  # the first version without it
    way: str  # what to do


# By key, or key=value where only a value is gone; a part may be a pattern: "teacher.*.steps".
REMOVED = {
    "objective.derivative=double_backward": Removed(
        "0.2",
        "a run that has it needs version 0.1, a new one takes finite_difference, or jvp, which is "
        "the same loss with the derivative held fixed",
    )
}


def removed(key: str, value: Any = None) -> str:
    """In words, since when there is no such setting, or no such value of it, and what to do; "" if
    there is, or never was.
    """
    for pattern, (since, way) in REMOVED.items():
        if fnmatchcase(key, pattern) or fnmatchcase(f"{key}={value}", pattern):
            return f"which is no more since bowstring {since}: {way}"
    return ""


# -----------------------------------------------------------------------------------------------
# Words used in configs/**: ${name:arguments}


def run_name(experiment: str, objective: str) -> str:
    """The experiment's plain name for the default objective, "<experiment>-<objective>" for
    another.
    """
    return experiment if objective == "traflow" else f"{experiment}-{objective}"


def model_folder(run_dir: str, step: int) -> str:
    """Folder of the model that the pre-training inside `run_dir` exports at `step`."""
    return str(files.RunDir(Path(run_dir)).teacher.model(int(step)))


def part_of(whole: int, divisor: int) -> int:
    """A `divisor`-th of `whole`, at least 1."""
    return max(1, int(whole) // int(divisor))


def times(value: int, factor: int) -> int:
    """`factor` times `value`."""
    return int(value) * int(factor)


def if_gpu(share: float) -> float:
    """`share` on a machine with a GPU, 0 on one without. Looks at device files, so it needs no
    torch.
    """
    found = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return float(share) if found else 0.0


def register_resolvers() -> None:
    """Makes the words above known to OmegaConf."""
    for word in (run_name, model_folder, part_of, times, if_gpu):
        OmegaConf.register_new_resolver(word.__name__, word, replace=True)


# -----------------------------------------------------------------------------------------------
# Teachers in a tree of settings
#
# What settings a teacher has depends on its kind, and any line of YAML or word of the command line
# may still change that. So the teachers of a tree have the settings of every kind, and `settled`
# makes of each the dataclass of its own kind once the tree is whole.


def setting_names(kind: Any) -> list[str]:
    """Names of the settings of a dataclass; none of another type."""
    return [one.name for one in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _own_settings() -> dict[str, tuple[str, Any, dataclasses.Field[Any]]]:
    """Name, type and field of every setting that only some kinds have, by name."""
    shared = setting_names(TeacherConfig)
    own: dict[str, tuple[str, Any, dataclasses.Field[Any]]] = {}
    for kind in TEACHERS.values():
        types = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in shared:
                continue
            _, known, other = own.setdefault(
                field.name, (field.name, types[field.name], copy.copy(field))
            )
            assert (known, other.default) == (types[field.name], field.default), field.name
    return own


# Neither is checked when it is made: that is for the dataclasses that `settled` makes.
UNCHECKED = {"__post_init__": lambda self: None}
AnyTeacher = dataclasses.make_dataclass(
    "AnyTeacher",
    [("kind", str, "native"), *_own_settings().values()],
    bases=(TeacherConfig,),
    namespace=UNCHECKED,
)
RunTree = dataclasses.make_dataclass(
    "RunTree",
    [("teacher", dict[str, AnyTeacher], MISSING)],
    bases=(RunConfig,),
    namespace=UNCHECKED,
)


def settled(tree: RunConfig) -> RunConfig:
    """The checked configuration of a RunTree.

    Raises:
        ConfigError: a teacher has a setting that its kind has not, or a value that cannot work.
    """
    values = {name: getattr(tree, name) for name in setting_names(RunConfig)}
    values["teacher"] = {name: _of_kind(name, given) for name, given in tree.teacher.items()}
    return RunConfig(**values)


def _of_kind(name: str, given: TeacherConfig) -> TeacherConfig:
    """`given` as the dataclass of its kind. A foreign setting at its default says nothing.

    A config.yaml of version 0.1 has the settings of every kind.
    """
    check_choice("teacher.kind", given.kind, tuple(TEACHERS))
    kind, blank = TEACHERS[given.kind], AnyTeacher()
    known = setting_names(kind)
    for setting in setting_names(type(given)):
        check(
            setting in known or getattr(given, setting) == getattr(blank, setting),
            f"there is no setting teacher.{name}.{setting} with teacher.{name}.kind="
            f"{given.kind}, which has: {', '.join(known)}",
        )
    return kind(**{key: getattr(given, key) for key in known})


# -----------------------------------------------------------------------------------------------
# Trees to dataclasses


def unknown_key(key: str, known: list[str]) -> str:
    """One sentence for a key that does not exist: since when, or the nearest of `known`, or all."""
    if gone := removed(key):
        return f"there was a setting {key}, {gone}"
    parent, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"there is no setting {key}; did you mean {parent + '.' if parent else ''}{near[0]}?"
    return f"there is no setting {key}" + (
        f"; {parent or 'a run'} has: {', '.join(known)}" if known else ""
    )


def sentence(error: errors.OmegaConfBaseException) -> str:
    """One sentence for the user: the key, what is wrong with it, the nearest key that exists."""
    key = error.full_key or str(error.key or "")
    if isinstance(error, errors.MissingMandatoryValue):
        return f"{key} has no value; set it on the command line, e.g. {key}=..."
    message = str(error.msg or error).splitlines()[0].rstrip(".")
    unknown = "not in struct" in message or "not in '" in message or "not found" in message
    if not unknown:
        return message if key and key in message else f"{key}: {message}" if key else message
    return unknown_key(key, setting_names(error.object_type))


def check_known(tree: DictConfig, prefix: str = "") -> None:
    """Raises ConfigError for a key that `+key=value` added beside the schema, or a value that is no
    more.
    """
    known = setting_names(OmegaConf.get_type(tree))
    for key, value in tree.items_ex(resolve=False):
        name = str(key)
        if known and name not in known:
            raise ConfigError(unknown_key(f"{prefix}{name}", known))
        is_there = not OmegaConf.is_missing(tree, name) and tree[name] is not None
        if isinstance(value, DictConfig) and is_there:
            check_known(value, f"{prefix}{name}.")
        elif is_there and (gone := removed(f"{prefix}{name}", tree[name])):
            raise ConfigError(f"there was {prefix}{name}={tree[name]}, {gone}")


def to_config(tree: DictConfig) -> RunConfig:
    """The typed, checked configuration of a composed tree. Raises ConfigError with one sentence."""
    check_known(tree)
    try:
        config = OmegaConf.to_object(tree)
    except errors.OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from error
    assert isinstance(config, RunConfig)
    config = settled(config)
    check(config.run.name != "", "run.name is empty; give the run a name")
    return config


# Settings whose ${...} is bash's, below a key `slurm`.
BASH = ("setup", "launch", "scratch", "container")


def is_bash(key: str) -> bool:
    """Whether `${...}` in the value of a dotted key is for bash."""
    return re.match(rf"cluster\.slurm\.({'|'.join(BASH)})\b", key) is not None


def escaped(value: Any) -> Any:
    """A plain value with the `${` of all its strings as text for OmegaConf."""
    if isinstance(value, str):
        return re.sub(r"(?<!\\)\$\{", r"\\${", value)
    if isinstance(value, dict):
        return {key: escaped(one) for key, one in value.items()}
    return [escaped(one) for one in value] if isinstance(value, list) else value


def with_bash(tree: Any) -> Any:
    """A plain tree in which what is for bash is text, wherever its key `slurm` stands."""
    if not isinstance(tree, dict):
        return tree
    found = {key: with_bash(value) for key, value in tree.items()}
    if isinstance(slurm := found.get("slurm"), dict):
        found["slurm"] = slurm | {key: escaped(slurm[key]) for key in BASH if key in slurm}
    return found


def to_tree(config: Any) -> DictConfig:
    """The plain values of a configuration dataclass, without types or interpolations."""
    tree = OmegaConf.create(with_bash(dataclasses.asdict(config)))
    assert isinstance(tree, DictConfig)
    return tree


# -----------------------------------------------------------------------------------------------
# config.yaml


SEAL = b"# sha256 of what follows: "


def save_config(run: files.RunDir, config: RunConfig) -> None:
    """Writes config.yaml of a run, atomically. Its first line is a hash of the rest."""
    content = OmegaConf.to_yaml(to_tree(config)).encode()
    files.write_atomic(
        run.config, SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n" + content
    )


def is_as_written(run: files.RunDir) -> bool:
    """Whether config.yaml is what a start wrote; one of an older version does not tell, and is."""
    first, _, content = files.read_bytes(run.config).partition(b"\n")
    sealed = first.startswith(SEAL)
    return not sealed or first[len(SEAL) :] == hashlib.sha256(content).hexdigest().encode()


def schema_for(stored: DictConfig, path: Path) -> DictConfig:
    """The typed tree that a stored configuration is merged into: its own network and objective
    variants.
    """
    tree = OmegaConf.structured(RunTree)
    for key, variants in (("student", NETWORKS), ("objective", OBJECTIVES)):
        name = str(OmegaConf.select(stored, f"{key}.name"))
        check(
            name in variants,
            f"{path}: {key}.name={name} is not known; choose one of: {', '.join(variants)}",
        )
        tree[key] = OmegaConf.structured(variants[name])
    assert isinstance(tree, DictConfig)
    return tree


def read_tree(path: Path) -> DictConfig:
    """The values in a config.yaml. Raises ConfigError for a file that is no configuration."""
    try:
        tree = files.patiently(partial(OmegaConf.load, path))
    except (OSError, ValueError, yaml.YAMLError, errors.OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    check(isinstance(tree, DictConfig) and len(tree) > 0, f"{path} holds no configuration")
    assert isinstance(tree, DictConfig)
    if OmegaConf.select(tree, "objective.name"):
        tree.objective.name = name_now(tree.objective)
    return tree


def as_before(tree: DictConfig, stored: DictConfig) -> None:
    """Gives the settings that `stored` is older than the values under which nothing changes. `tree`
    is `stored` merged into its schema.
    """
    kind = OmegaConf.get_type(tree)
    if kind is AnyTeacher:
        kind = TEACHERS.get(tree.kind, TeacherConfig)
    if dataclasses.is_dataclass(kind):
        tree.update(lacking(kind, stored))
    for key, part in tree.items_ex(resolve=False):
        if isinstance(part, DictConfig) and not OmegaConf.is_missing(tree, key) and part:
            as_before(part, stored.get(key) or OmegaConf.create({}))


def move_to(tree: DictConfig, folder: str) -> None:
    """Points a stored configuration at `folder`: run.dir, and every path inside the old run.dir."""
    old = str(tree.run.dir)
    for teacher in tree.teacher.values():
        teacher.path = _moved(str(teacher.path), old, folder)
    if "trajectory" in tree and "location" in tree.trajectory:
        tree.trajectory.location = _moved(str(tree.trajectory.location), old, folder)
    tree.run.dir = folder


def _moved(path: str, old: str, new: str) -> str:
    """`path`, below `new` if it was below `old`."""
    return new + path[len(old) :] if path.startswith(old + "/") else path


def shard_location(run: files.RunDir) -> str:
    """`trajectory.location` of a run as it was last started; "" before its first start."""
    if not run.config.exists():
        return ""
    tree = read_tree(run.config)
    location = str(OmegaConf.select(tree, "trajectory.location") or "")
    return _moved(location, str(OmegaConf.select(tree, "run.dir")), str(run.root))


def dotted(overrides: list[str]) -> DictConfig:
    """key=value overrides as a tree. Raises ConfigError for what only a new run can do."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        check(
            bool(equals) and not override.startswith(("-", "+", "~")),
            f"{override} is not understood on an existing run; use key=value",
        )
        check(
            key not in GROUPS and key not in ("objective.name", "student.name"),
            f"{override} cannot be changed on an existing run; start another one with "
            f"experiment=... {override}",
        )
    pairs = [(key, value) for key, _, value in (word.partition("=") for word in overrides)]
    try:
        tree = OmegaConf.from_dotlist([f"{k}={v}" for k, v in pairs if not is_bash(k)])
        for key, value in pairs:
            if is_bash(key):
                OmegaConf.update(tree, key, escaped(yaml.safe_load(value)))
        return tree
    except (ValueError, yaml.YAMLError, errors.OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {' '.join(overrides)}: {error}") from error


def load_config(run: files.RunDir, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of an existing run, with key=value overrides merged on top and checked.

    A run folder that was moved or renamed is followed: run.dir is where it was found. With
    `run.name=NAME` among the overrides the result is a new run NAME beside it.

    Raises:
        ConfigError: it cannot be read, or cannot work, or a newer version wrote the run.
    """
    check(run.root.is_dir(), f"there is no run at {run.root}")
    check(run.config.exists(), f"{run.root} is not a run: it has no {run.config.name}")
    try:
        return _load(run, overrides or [])
    except ConfigError as error:
        record = identity.read_record(run)  # a newer version has settings that are not known here
        raise ConfigError(f"{error}{identity.newer(record.versions) if record else ''}") from error


def _load(run: files.RunDir, overrides: list[str]) -> RunConfig:
    stored = read_tree(run.config)
    changes = dotted(overrides)
    try:
        tree = OmegaConf.merge(schema_for(stored, run.config), stored)
        assert isinstance(tree, DictConfig)
        as_before(tree, stored)
        name = OmegaConf.select(changes, "run.name")
        folder = run.root if name is None else run.root.parent / str(name)
        move_to(tree, str(OmegaConf.select(changes, "run.dir") or folder))
        tree = OmegaConf.merge(tree, changes)
    except errors.OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from error
    assert isinstance(tree, DictConfig)
    return to_config(tree)
