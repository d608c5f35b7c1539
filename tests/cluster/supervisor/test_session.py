"""The session of a run, the cursor and the progress shown."""

import errno
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.settings.hydra import compose
from cluster.state.cursor import Position, read_cursor
from cluster.state.lock import holder, is_live
from cluster.supervisor.session import (
    Stopped,
    check_shared_memory,
    hidden_gpus,
    is_alive,
    mend_token,
    missing_resources,
    open_session,
    raise_file_limit,
)
from distill.config import ConfigError
from distill.run import logs
from distill.run.files import RunDir, append_lines
from distill.run.measured import last_step


@pytest.fixture
def config(tmp_path):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    return config


def test_a_session_has_the_run_and_a_scratch_folder_of_its_own(config, tmp_path):
    run = RunDir(tmp_path / "run")
    with open_session(config, run) as session:
        assert session.scratch.is_dir() and holder(run).pid == os.getpid()
    assert not session.scratch.exists() and not is_live(run)


def test_a_child_that_was_killed_is_dead_before_and_after_it_is_waited_for():
    child = psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert is_alive(child)
    child.kill()
    while is_alive(child):
        pass
    child.wait()
    assert not is_alive(child)


def test_sigterm_while_ray_starts_is_a_stop(config, tmp_path, monkeypatch):
    """Ray takes the signal then, and leaves by SystemExit."""

    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ray.init", init)
    with open_session(config, RunDir(tmp_path / "run")) as session:
        with pytest.raises(Stopped):
            session.start_ray()
        assert session.stop_signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == session._on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_start_of_ray_at_once_and_nothing_of_it_stays(
    config, tmp_path, monkeypatch, number
):
    def init(**options):
        (Path(options["_temp_dir"]) / "session").mkdir(parents=True)
        daemon = shutil.copy("/bin/sleep", tmp_path / "raylet")
        children.append(psutil.Popen([daemon, "60"]))
        os.kill(os.getpid(), number)
        time.sleep(60)

    children = []
    monkeypatch.setattr("ray.init", init)
    with open_session(config, RunDir(tmp_path / "run")) as session, pytest.raises(Stopped):
        session.start_ray()
    assert session.stop_signal == number
    assert not is_alive(children[0]) and not session._ray_temp.exists()


def test_a_local_ray_is_this_users_and_asks_for_a_token(config, tmp_path, monkeypatch):
    found = {}

    def init(**options):
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert token.parent == Path(options["_temp_dir"]).parent
        found.update(
            token=stat.S_IMODE(token.stat().st_mode),
            folder=stat.S_IMODE(token.parent.stat().st_mode),
            secret=token.read_text(),
            mode=os.environ.get("RAY_AUTH_MODE"),
            given=os.environ.get("RAY_AUTH_TOKEN"),
        )

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "everybody knows it")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    old = os.umask(0)
    try:
        with open_session(config, RunDir(tmp_path / "run")) as session:
            session._try_local_ray()
    finally:
        os.umask(old)
    assert (found["token"], found["folder"], len(found["secret"])) == (0o600, 0o700, 64)
    assert found["mode"] is None and found["given"] is None  # so Ray asks for one by itself


def test_a_temporary_folder_without_room_is_named(config, tmp_path, monkeypatch):
    with open_session(config, RunDir(tmp_path / "run")) as session:
        session._ray_temp = tmp_path / "file" / "bow"
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"cannot write to .*bow, where Ray's .*TMPDIR"):
            session._try_local_ray()
        session._ray_temp = tmp_path / "bow"
        monkeypatch.setattr("cluster.supervisor.session.ROOM_BYTES", 10**18)
        with pytest.raises(ConfigError, match=r"\([0-9,]+ bytes left of 1,000,000,0.*TMPDIR"):
            session._try_local_ray()


def test_shared_memory_that_is_missing_or_small_is_said_with_the_way_out(
    config, tmp_path, monkeypatch
):
    assert check_shared_memory(1) == ""
    monkeypatch.setattr("cluster.supervisor.session.LARGE_STORE_BYTES", 10**19)
    assert "cluster.object_store_bytes; in a container" in check_shared_memory(10**18)
    monkeypatch.setattr("cluster.supervisor.session.LARGE_STORE_BYTES", 10**18)
    with pytest.raises(ConfigError, match=r"/dev/shm has [0-9,]+ bytes free of .*--shm-size"):
        check_shared_memory(10**18)
    monkeypatch.setattr("cluster.supervisor.session.SHARED_MEMORY", tmp_path / "none")
    with (
        open_session(config, RunDir(tmp_path / "run")) as session,
        pytest.raises(ConfigError, match=r"Ray needs .*none, and that cannot be used .*--shm-size"),
    ):
        session.start_ray()


def test_a_token_that_others_can_read_is_mended_or_refused(tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    mend_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.chmod(0o640)

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(ConfigError, match="token lets others join the cluster"):
        mend_token()


def test_a_low_limit_of_open_files_is_raised_or_said(monkeypatch):
    limits = [(256, 4096), (4096, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits.pop(0))
    raised = []
    monkeypatch.setattr("resource.setrlimit", lambda _, pair: raised.append(pair))
    raise_file_limit()
    assert raised == [(4096, 4096)]
    limits += [(256, 256), (256, 256)]
    with pytest.raises(ConfigError, match=r"lets a process open 256 files, and Ray needs 1024"):
        raise_file_limit()


@pytest.mark.parametrize("visible", ["", "NoDevFiles"])
def test_hidden_gpus_are_named_where_gpus_are_missing(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"CUDA_VISIBLE_DEVICES='{visible}'" in hidden_gpus(["GPU: 1 asked for, 0 there"])
    assert hidden_gpus(["CPU: 4 asked for, 2 there"]) == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert hidden_gpus(["GPU: 1 asked for, 0 there"]) == ""


@pytest.mark.parametrize(
    ("failures", "error"), [(0, OSError), (2, RuntimeError), (2, Exception), (3, RuntimeError)]
)
def test_a_ray_that_does_not_start_is_started_again(config, tmp_path, monkeypatch, failures, error):
    """And never the cluster that somebody's RAY_ADDRESS names is joined in its place."""
    starts = []

    def init(**options):
        starts.append(options["address"])
        raylet = Path(options["_temp_dir"]) / "session_latest/logs/raylet.out"
        raylet.parent.mkdir(parents=True)
        raylet.write_text(f"no memory {len(starts)}")
        if len(starts) <= failures:
            raise error("long story\nthe raylet did not register in time")

    monkeypatch.setattr("ray.init", init)
    with open_session(config, RunDir(tmp_path / "run")) as session:
        if failures < 3:
            session._try_local_ray()
        else:
            words = r"in 3 tries \(the raylet did not register in time\); its load is"
            with pytest.raises(ConnectionError, match=words) as raised:
                session.start_ray()
            kept = logs.here(session.run) / "ray"
            assert f"Ray's own words are in {kept}" in str(raised.value)
            assert (kept / "raylet.out").read_text() == "no memory 3"
    assert starts == ["local"] * min(failures + 1, 3)


def test_what_a_cluster_lacks_is_said_in_numbers(config):
    assert missing_resources(config, {"trainer": 2.0, "CPU": 8.0}) == []
    assert missing_resources(config, {"CPU": 1.0, "trainer": 2.0}) == ["CPU: 3 asked for, 1 there"]


def test_teachers_with_slurm_jobs_of_their_own_come_later(tmp_path):
    (config,) = compose(
        ["experiment=tiny", "cluster=slurm", "cluster.trainer.num_workers=1", f"run.dir={tmp_path}"]
    )
    assert missing_resources(config, {"trainer": 1.0, "CPU": 1.0}) == []
    assert missing_resources(config, {"CPU": 1.0}) == ["trainer: 1 asked for, 0 there"]


def test_a_ray_cluster_that_nobody_named_is_not_joined(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (config,) = compose(["experiment=tiny", "cluster=slurm", f"run.dir={tmp_path / 'run'}"])
    with open_session(config, RunDir(tmp_path / "run")) as session:
        refused = pytest.raises(ConfigError, match="RAY_ADDRESS names, and that is not set")
        with refused:
            session.start_ray()


def test_the_cursor_is_at_the_start_until_there_is_one(tmp_path):
    run = RunDir(tmp_path)
    assert read_cursor(run) == Position(0, "")
    run.cursor.write_text('{"block": 3, "waiting_for": "shard 12"}')
    assert read_cursor(run) == Position(3, "shard 12")


def test_the_last_step_survives_a_torn_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert last_step(metrics) == 0
    for step in (10, 20):
        append_lines(metrics, [{"step": step}])
    with metrics.open("a") as file:
        file.write('{"step": 3')
    assert last_step(metrics) == 20


def test_after_a_local_ray_the_environment_is_what_it_was(tmp_path, monkeypatch):
    """Its children may be jobs of a cluster, to which a local Ray's words mean other things."""
    names = ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    before = {name: os.environ.get(name) for name in names}
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    with open_session(config, config.files) as session:
        session._guard()
        session._guard()  # a second try
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        assert "RAY_AUTH_MODE" not in os.environ
    assert {name: os.environ.get(name) for name in names} == before
