"""A shared file system answers one read with an error, or shows half a file; the next is right."""

import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.run import files
from distill.run.files import PAUSES_S, patiently


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """Pauses of `files` alone, which are not made: threads of other tests go on to sleep."""
    found: list[float] = []
    monkeypatch.setattr(files, "time", SimpleNamespace(**vars(time) | {"sleep": found.append}))
    return found


def answers(*errors):
    left = list(errors)

    def read():
        if left:
            raise left.pop(0)
        return "content"

    return read


@pytest.mark.parametrize("number", files.PASSING)
def test_a_passing_error_is_waited_out(waited, number):
    error = OSError(number, os.strerror(number))
    assert patiently(answers(*[error] * len(PAUSES_S))) == "content"
    assert waited == list(PAUSES_S)
    with pytest.raises(OSError, match=os.strerror(number)):
        patiently(answers(*[error] * (len(PAUSES_S) + 1)))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC])
def test_other_errors_are_said_at_once(waited, number):
    with pytest.raises(OSError):
        patiently(answers(OSError(number, os.strerror(number))))
    assert waited == []


def test_half_a_file_is_looked_at_again_for_a_moment(waited):
    assert patiently(answers(*[ValueError("half")] * files.LOOKS), ValueError) == "content"
    with pytest.raises(ValueError, match="half"):
        patiently(answers(*[ValueError("half")] * (files.LOOKS + 1)), ValueError)
    assert sum(waited) < 2


def test_a_log_goes_on_where_the_error_came(tmp_path, monkeypatch, waited):
    path, lines = tmp_path / "events.jsonl", [{"n": n, "pad": "x" * 999} for n in range(3000)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened, fails = Path.open, iter([False, True, True, False, True] + [False] * 9)

    def sometimes(*args, **kwargs):
        if args[0] == path and next(fails):  # other threads open other files
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(*args, **kwargs)

    monkeypatch.setattr(Path, "open", sometimes)
    assert [n for n, _ in files.numbered_lines(path)] == list(range(1, 3001))
    assert len(waited) == 3


def test_a_file_that_cannot_be_seen_is_not_taken_for_missing(tmp_path, monkeypatch, waited):
    assert not files.is_there(tmp_path / "a") and files.is_there(tmp_path)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: answers(OSError(errno.ESTALE, "stale"))())
    with pytest.raises(OSError, match="stale"):
        files.is_there(tmp_path)
