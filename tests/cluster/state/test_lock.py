"""The lock of a run: who holds it, and that a dead process holds nothing."""

import errno
import os
import socket
import subprocess
import sys
import threading

import pytest

from cluster.state.lock import Holder, held, holder, is_live
from distill.config import ConfigError
from distill.run.files import RunDir

HOLD = """
import sys, time
from pathlib import Path
from cluster.state.lock import held
from distill.run.files import RunDir
with held(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def test_a_run_has_one_supervisor_and_a_dead_one_holds_nothing(run, monkeypatch):
    monkeypatch.setattr("cluster.state.lock.PATIENCE_S", 0.2)
    command = [sys.executable, "-c", HOLD, str(run.root)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert is_live(run) and holder(run) == Holder(socket.gethostname(), other.pid)
    busy = pytest.raises(ConfigError, match=f"being worked on by another process.*{other.pid}")
    with busy, held(run):
        pass
    other.kill()
    other.wait()
    assert not is_live(run) and holder(run) is None
    with held(run):
        assert holder(run) == Holder(socket.gethostname(), os.getpid())
    assert holder(run) is None


def test_one_who_waits_gets_the_run_when_the_other_leaves_it(run, monkeypatch, capsys):
    monkeypatch.setattr("cluster.state.lock.PATIENCE_S", 0.2)
    command = [sys.executable, "-c", HOLD, str(run.root)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    threading.Timer(1, other.kill).start()
    with held(run, patience_s=30.0):
        assert holder(run) == Holder(socket.gethostname(), os.getpid())
    other.wait()
    assert str(other.pid) in capsys.readouterr().out


def test_a_run_that_never_began_is_not_live(run):
    assert not is_live(run) and holder(run) is None
    assert not run.root.exists()


def test_a_supervisor_that_has_not_yet_said_who_it_is_is_nobody(run):
    with held(run):
        os.truncate(run.lock, 0)
        assert is_live(run) and holder(run) is None


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    elsewhere = pytest.raises(ConfigError, match=r"cannot write to run.dir=.*Not a directory")
    with elsewhere, held(RunDir(tmp_path / "file" / "run")):
        pass


def test_a_file_system_without_locks_is_refused_by_name(tmp_path, monkeypatch):
    """Two supervisors could not be told apart there."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    words = r"has no locks \(No locks available\)"
    with pytest.raises(ConfigError, match=words), held(RunDir(tmp_path)):
        pass
    assert not is_live(RunDir(tmp_path))
