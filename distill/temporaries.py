"""Names of files in the making, and the removal of those that killed processes left."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from pathlib import Path

TEMPORARY = re.compile(r"\.\d{8,}\.(?:tar|json)\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
STALE_S = 3600.0  # what rests this long without its final name has no live producer


def temporary_path(final: Path) -> Path:
    """A name next to `final` that is this process's own and that no reader looks at."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return final.with_name(f".{final.name}.tmp-{owner}")


def clean_temporaries(folder: Path) -> list[Path]:
    """The temporary files in `folder` that were removed: those whose producer is dead.

    On this machine that is seen from the process; elsewhere a file that rests for an hour counts.
    """
    removed = []
    for path in sorted(folder.glob(".*.tmp-*")):
        match = TEMPORARY.fullmatch(path.name)
        try:
            rests_s = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        here = match is not None and match["host"] == socket.gethostname()
        if rests_s > STALE_S or (match is not None and here and not _is_alive(int(match["pid"]))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
