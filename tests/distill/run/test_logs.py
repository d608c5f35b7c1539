"""What a process prints, to its last word; real processes."""

import os
import socket
import subprocess
import sys
import time

import pytest

from distill.run import logs
from distill.run.files import RunDir

PRINTS = """
import ctypes, os, sys
from pathlib import Path
from distill.run import logs
from distill.run.files import RunDir
logs.MAX_BYTES, logs.CHECK_PERIOD_S = 20_000, 0.05
logs.keep(RunDir(Path(sys.argv[1])), logs.rank_name(3))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = RunDir(tmp_path)
    logs.begin(run)
    return run


def process(run, text):
    return subprocess.run([sys.executable, "-c", PRINTS + text, str(run.root)], timeout=60)


def said(run, name="rank-00003.txt"):
    return (logs.now(run) / socket.gethostname() / name).read_text()


def test_the_last_words_of_a_process_that_crashes_are_kept_whoever_says_them(run):
    done = process(
        run,
        "print('of Python', flush=True); os.system('echo of a child')\n"
        "ctypes.CDLL(None).puts(b'of C'); ctypes.CDLL(None).fflush(None)\n"
        "sys.stderr.write('an error'); os.abort()",
    )
    assert done.returncode < 0
    heading, *lines = said(run).splitlines()
    assert heading.startswith("---- ") and " process " in heading
    assert lines == ["of Python", "of a child", "of C", "an error"]
    process(run, "print('once more')")  # the next group of this start
    assert said(run).splitlines()[-1] == "once more" and "of C" in said(run)


def test_a_process_that_prints_without_end_keeps_its_last_words_within_a_bound(run):
    text = "import time\nfor n in range(400):\n    print(f'{n:05d}', 'x' * 200, flush=True)\n"
    process(run, text + "    time.sleep(0.005)")
    folder = logs.now(run) / socket.gethostname()
    # The first name is not there yet where the process ends between a file and the next.
    files = [folder / "rank-00003.txt.1", *folder.glob("rank-00003.txt")]
    assert set(folder.iterdir()) == set(files)
    assert sum(file.stat().st_size for file in files) < 60_000  # of 82,800
    lines = "".join(file.read_text() for file in files).splitlines()
    numbers = [int(line[:5]) for line in lines]
    assert numbers == list(range(numbers[0], 400))


def test_a_run_without_room_for_logs_goes_on(run):
    logs.now(run).rmdir()
    logs.now(run).write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-c", PRINTS + "print('as before')", str(run.root)], capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"as before\n")


def test_a_start_is_a_job_with_its_restarts_and_old_ones_go(run, monkeypatch):
    os.utime(logs.now(run), (0, 0))
    for number in range(logs.MAX_STARTS + 5):
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        logs.begin(run)
        os.utime(logs.now(run), (0, time.time() - 1000 + number))
    names = [folder.name for folder in logs.starts(run)]
    assert names == [f"12.{n}" for n in range(5, logs.MAX_STARTS + 5)]
    assert logs.now(run).name == names[-1]


def test_of_rays_own_logs_the_end_is_kept(run, tmp_path):
    assert logs.keep_ray(run, tmp_path / "session") is None and logs.words(run) == ""
    folder = tmp_path / "session" / "logs"
    folder.mkdir(parents=True)
    (folder / "raylet.out").write_text("x" * logs.RAY_BYTES + "the end")
    (folder / "empty.err").write_text("")
    kept = logs.keep_ray(run, tmp_path / "session")
    assert [path.name for path in kept.iterdir()] == ["raylet.out"]
    text = (kept / "raylet.out").read_text()
    assert text.endswith("xthe end") and len(text) == logs.RAY_BYTES
