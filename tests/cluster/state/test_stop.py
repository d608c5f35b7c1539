"""`bowstring stop` of a run without Slurm."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from cluster.cli.main import dispatch
from cluster.settings.file import save_config
from cluster.settings.hydra import compose
from distill.config import ConfigError
from distill.run.files import RunDir

SUPERVISOR = """
import sys, time
from pathlib import Path
from cluster.settings.hydra import compose
from cluster.supervisor.session import open_session
from distill.run.files import RunDir
(config,) = compose(["experiment=tiny", f"run.dir={sys.argv[1]}"])
with open_session(config, RunDir(Path(sys.argv[1]))) as session, session.stopping_at_once():
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path}"])
    save_config(RunDir(tmp_path), config)
    return RunDir(tmp_path)


@pytest.fixture
def supervisor(run):
    command = [sys.executable, "-c", SUPERVISOR, str(run.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"at work\n"
        yield process
        process.kill()


def test_the_supervisor_is_asked_as_by_sigterm(run, supervisor, capsys):
    started = time.monotonic()
    assert dispatch(["stop", str(run.root)]) == 0
    assert capsys.readouterr().out == f"process {supervisor.pid}: saves, then ends\n"
    assert (
        supervisor.wait(30) == 1
        and b"cluster.supervisor.session.Stopped" in supervisor.stderr.read()
    )
    assert time.monotonic() - started < 30
    with pytest.raises(ConfigError, match="is not running, and has no Slurm jobs"):
        dispatch(["stop", str(run.root)])


def test_a_process_on_another_machine_is_left_alone(run, supervisor, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    there = json.loads(run.lock.read_text())["host"]
    with pytest.raises(ConfigError, match=f"process {supervisor.pid} on {there}; run .* there"):
        dispatch(["stop", str(run.root)])
    assert supervisor.poll() is None
    supervisor.send_signal(signal.SIGKILL)
