"""Lines that several writers append, and what a crash or a full disk leaves of them."""

import os

import pytest

from distill.run import files
from distill.run.files import append_lines, read_lines


def test_lines_come_back_in_order(tmp_path):
    for step in range(3):
        append_lines(tmp_path / "lines", [{"step": step}, {"step": step}])
    assert [line["step"] for line in read_lines(tmp_path / "lines")] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b'{"step": 1, "lo', id="torn by a crash"),
        pytest.param(b"\0" * 64, id="zeros of a block that was never written"),
        pytest.param(b'{"step": "\xff\xfe"}\n', id="no text"),
        pytest.param(b"[1]\n", id="no record"),
    ],
)
def test_a_damaged_line_costs_itself_only(tmp_path, damage):
    path = tmp_path / "lines"
    append_lines(path, [{"step": 0}])
    with path.open("ab") as file:
        file.write(damage)
    append_lines(path, [{"step": 2}])
    assert [line["step"] for line in read_lines(path)] == [0, 2]


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda file, data: write(file, data[:7]))
    append_lines(tmp_path / "lines", [{"kind": "steps", "first": 0, "last": 9}])
    append_lines(tmp_path / "lines", [{"kind": "steps", "first": 10, "last": 19}])
    assert [line["last"] for line in read_lines(tmp_path / "lines")] == [9, 19]
