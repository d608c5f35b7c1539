"""What `bowstring logs` prints: the words of ranks and workers, from the run's files only."""

import time
from collections.abc import Iterator
from pathlib import Path

from rich import console, table

from distill.config import ConfigError, check
from distill.run import logs
from distill.run.files import RunDir

LOOK_PERIOD_S = 0.5


def files_of(folder: Path, rank: int | None, worker: str | None) -> list[Path]:
    """The files of a start that are asked for, in the order in which they were written."""
    pattern = "*/**/*" if rank is None and worker is None else "*/worker-*.txt*"
    if rank is not None:
        pattern = f"*/{logs.rank_name(rank)}*"
    found = [path for path in folder.glob(pattern) if path.is_file()]
    if worker is not None:  # HOST:PID as `status` and the events have it, or the process id
        host, _, pid = worker.rpartition(":")
        name = logs.worker_name(int(pid)) if pid.isdigit() else None
        found = [
            path
            for path in found
            if name in (path.name, path.name.removesuffix(".1")) and host in ("", path.parent.name)
        ]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def show(run: RunDir, rank: int | None, worker: str | None, follow: bool) -> None:
    """Prints what a rank or a worker has said in the newest start, or which files there are; with
    `follow` also what is added from now on, of all of them unless one is named, until interrupted.

    Raises:
        ConfigError: there is none.
    """
    folder = logs.now(run)
    check(
        folder is not None and folder.is_dir(),
        f"{run.root} has no {run.logs.name}: none of its ranks or workers has started, or that was "
        "before version 0.2",
    )
    assert folder is not None
    chosen = rank is not None or worker is not None
    found = files_of(folder, rank, worker)
    if chosen and not found and not follow:
        raise ConfigError(
            f"{'rank ' + str(rank) if rank is not None else 'worker ' + str(worker)} has said "
            f"nothing in the newest start; {folder} has: "
            + (", ".join(str(path.relative_to(folder)) for path in files_of(folder, None, None)))
        )
    if follow:
        for line in lines(run, rank, worker):
            print(line, flush=True)
    elif chosen:
        for path in found:
            print(path.read_text(errors="replace"), end="")
    else:
        _list(folder, found)


def _list(folder: Path, found: list[Path]) -> None:
    """The files of a start, each with its last line."""
    grid = table.Table("file", "bytes", "last line", title=str(folder), title_justify="left")
    for path in found:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            last = file.read().decode(errors="replace").strip().splitlines()[-1:]
        grid.add_row(str(path.relative_to(folder)), f"{path.stat().st_size:,}", *last)
    console.Console(markup=False).print(grid)  # a line may have brackets


def lines(run: RunDir, rank: int | None, worker: str | None) -> Iterator[str]:
    """The lines that are there and all that come, also in a later start; each with its file where
    no single one is asked for.

    A file that became too long goes on under its name; what is left of it has another one.
    """
    read: dict[tuple[int, int], int] = {}  # bytes, by the file itself and not by its name
    rest: dict[tuple[int, int], bytes] = {}
    before = logs.now(run)
    while True:
        folders = [folder for folder in dict.fromkeys((before, logs.now(run))) if folder]
        before = folders[-1] if folders else None  # of the start before all is read once more
        for path in [path for folder in folders for path in files_of(folder, rank, worker)]:
            about = path.stat()
            key = (about.st_dev, about.st_ino)
            if about.st_size < read.get(key, 0):  # another file got the number of one that is gone
                del read[key]
            if about.st_size == read.get(key, 0):
                continue
            with path.open("rb") as file:
                file.seek(read.get(key, 0))
                data = rest.pop(key, b"") + file.read()
                read[key] = file.tell()
            *whole, rest[key] = data.split(b"\n")
            named = rank is not None or worker is not None
            name = "" if named else f"{path.parent.name}/{path.name}: "
            for line in whole:
                yield name + line.decode(errors="replace")
        time.sleep(LOOK_PERIOD_S)
