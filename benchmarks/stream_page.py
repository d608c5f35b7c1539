"""Tables of `benchmarks/stream.py`."""

from __future__ import annotations


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)
