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


def write_cursor(run: files.RunDir, block: int, waiting_for: str) -> None:
    """Writes the newest block being read, and what the trainer waits for, "" when it does not."""
    files.write_json(run.cursor, records.tree_of(Position(block, waiting_for)))


def read_cursor(run: files.RunDir) -> Position:
    """Where the trainer reads; the first block before it has started, or where the file is torn."""
    try:
        return records.read_record(Position, run.cursor)
    except (FileNotFoundError, records.RecordError):
        return Position(0, "")
