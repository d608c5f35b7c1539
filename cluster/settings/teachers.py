"""Teachers in a tree of settings.

What settings a teacher has depends on its kind, and any line of YAML or word of the command line
may still change that. So the teachers of a tree have the settings of every kind, and `settled`
makes of each the dataclass of its own kind once the tree is whole.
"""

import copy
from dataclasses import Field, fields, make_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING

from cluster.settings.schema import RunConfig
from distill.config import check, check_choice
from distill.teachers.config import TEACHERS, TeacherConfig


def _own_settings() -> dict[str, tuple[str, Any, Field[Any]]]:
    """Name, type and field of every setting that only some kinds have, by name."""
    shared = {field.name for field in fields(TeacherConfig)}
    own: dict[str, tuple[str, Any, Field[Any]]] = {}
    for kind in TEACHERS.values():
        types = get_type_hints(kind)
        for field in fields(kind):
            if field.name in shared:
                continue
            _, known, other = own.setdefault(
                field.name, (field.name, types[field.name], copy.copy(field))
            )
            assert (known, other.default) == (types[field.name], field.default), field.name
    return own


# Neither is checked when it is made: that is for the dataclasses that `settled` makes.
UNCHECKED = {"__post_init__": lambda self: None}
AnyTeacher = make_dataclass(
    "AnyTeacher",
    [("kind", str, "native"), *_own_settings().values()],
    bases=(TeacherConfig,),
    namespace=UNCHECKED,
)
RunTree = make_dataclass(
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
    values = {field.name: getattr(tree, field.name) for field in fields(RunConfig)}
    values["teacher"] = {name: _of_kind(name, given) for name, given in tree.teacher.items()}
    return RunConfig(**values)


def _of_kind(name: str, given: TeacherConfig) -> TeacherConfig:
    """`given` as the dataclass of its kind. A foreign setting at its default says nothing.

    A config.yaml of version 0.1 has the settings of every kind.
    """
    check_choice("teacher.kind", given.kind, tuple(TEACHERS))
    kind, blank = TEACHERS[given.kind], AnyTeacher()
    known = [field.name for field in fields(kind)]
    for field in fields(given):
        value = getattr(given, field.name)
        check(
            field.name in known or value == getattr(blank, field.name),
            f"there is no setting teacher.{name}.{field.name} with teacher.{name}.kind="
            f"{given.kind}, which has: {', '.join(known)}",
        )
    return kind(**{key: getattr(given, key) for key in known})
