"""Staging to resume. `read_average` is found here too, where docs/formats.md named it before the
rooms; importing it brings torch, so only who asks for it does.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "read_average":
        from distill.checkpoint.commit import read_average

        return read_average
    raise AttributeError(f"module {__name__} has no attribute {name}")
