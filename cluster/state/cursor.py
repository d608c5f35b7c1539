"""Where the trainer reads: `cursor.json`, by which the coordinator holds the teachers back.

    {"block": the newest block being read, "waiting_for": "" or why no batch came yet}

Losing the file costs nothing but time: shards that exist are not made again.
"""

from dataclasses import dataclass

from distill.run import files, records


@dataclass(frozen=True)
class Position:
    """cursor.json."""

    block: int  # of shards, the newest that is being read
    waiting_for: str  # why no batch came yet; "" when the trainer does not wait


START = Position(0, "")
LONGEST = 300  # characters of a reason that are shown


def write_cursor(run: files.RunDir, block: int, waiting_for: str) -> None:
    """Writes the newest block being read, and what the trainer waits for, "" when it does not."""
    files.write_json(run.cursor, records.tree_of(Position(block, waiting_for)))


def read_cursor(run: files.RunDir, known: Position = START) -> Position:
    """Where the trainer reads; `known` where the file does not say it: before it has started, while
    a file server is away, or where anything else stands in the file.
    """
    try:
        found = records.parse_record(Position, run.cursor.read_bytes())
    except (OSError, records.RecordError):
        return known
    words = "".join(char for char in found.waiting_for[:LONGEST] if char.isprintable())
    return Position(found.block, words) if found.block >= 0 else known
