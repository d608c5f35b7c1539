"""Every objective that exists, with the settings that change what it calls.

Nothing is listed here: a new row of OBJECTIVES is walked over with all its choices and weights.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import product

from distill.config import ConfigError
from distill.objectives.config import OBJECTIVES, ObjectiveConfig


def choices(kind: type[ObjectiveConfig], setting: str) -> list[str]:
    """What a setting may be, as the refusal of a wrong value says; [] if it takes any."""
    try:
        kind(**{setting: "?"})
    except ConfigError as error:
        return re.split(", ", str(error).partition("choose one of: ")[2])
    return []


def settings_of(kind: type[ObjectiveConfig]) -> dict[str, list]:
    """By name, the values of every choice, 0 and 1 for every weight, 0 and a quarter for every
    share; not the distance, which calls no student."""
    found = {}
    for field in fields(kind):
        if field.name.startswith("weight_"):
            found[field.name] = [0.0, 1.0]
        elif field.name.startswith("share_"):
            found[field.name] = [0.0, 0.25]
        elif field.type == "str" and field.name not in ("name", "distance", "lpips_backbone"):
            found[field.name] = choices(kind, field.name)
            assert len(found[field.name]) > 1, f"{kind.__name__}.{field.name} offers no choice"
    return found


def combinations(kind: type[ObjectiveConfig]) -> Iterator[ObjectiveConfig]:
    """All choices with one another; of the weights all, all but one, and one alone."""
    offered = settings_of(kind)
    for values in product(*offered.values()):
        given = dict(zip(offered, values, strict=True))
        weights = [value for name, value in given.items() if name.startswith("weight_")]
        if not weights or sum(weights) in (1, len(weights) - 1, len(weights)):
            yield kind(**given)


def variants(kind: type[ObjectiveConfig]) -> dict[str, ObjectiveConfig]:
    """By name, the default and everything one setting away from it."""
    default = kind()
    found = {default.name: default}
    for name, values in settings_of(kind).items():
        is_on = name.startswith(("weight_", "share_")) and getattr(default, name) > 0
        for value in [0.0] if is_on else [v for v in values if v != getattr(default, name)]:
            found[f"{default.name}-{name}={value}"] = kind(**{name: value})
    return found


EVERY = {name: config for kind in OBJECTIVES.values() for name, config in variants(kind).items()}
