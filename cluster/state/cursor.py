"""Where the trainer reads: `cursor.json`, by which the coordinator holds the teachers back.

    {"block": the block being read, "waiting_for": "" or why no batch came yet}

Losing the file costs nothing but time: shards that exist are not made again.
"""

from __future__ import annotations

import json

from distill.run.dir import RunDir
from distill.run.files import write_json


def write_cursor(run: RunDir, block: int, waiting_for: str) -> None:
    """Writes the block being read, and what the trainer waits for; "" when it does not wait."""
    write_json(run.cursor, {"block": block, "waiting_for": waiting_for})


def read_cursor(run: RunDir) -> tuple[int, str]:
    """The block being read, and what the trainer waits for; (0, "") before it has started."""
    try:
        cursor = json.loads(run.cursor.read_text())
        return int(cursor["block"]), str(cursor["waiting_for"])
    except (FileNotFoundError, ValueError, KeyError):
        return 0, ""
