"""`bowstring logs`: which files, and what is added to them."""

import threading
from itertools import islice

import pytest

from cluster.cli.main import dispatch
from cluster.inspect import logs as shown
from distill.config import ConfigError
from distill.run import logs
from distill.run.files import RunDir


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(shown, "LOOK_PERIOD_S", 0.01)
    return RunDir(tmp_path)


def write(run, name, text):
    path = logs.now(run) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    return path


def test_a_rank_or_a_worker_is_found_on_whatever_node(run, capsys):
    logs.begin(run)
    write(run, "node1/rank-00000.txt", "zero\n")
    write(run, "node2/rank-00001.txt.1", "one, before\n")
    write(run, "node2/rank-00001.txt", "one [now]\n")
    write(run, "node2/worker-7.txt", "seven\n")
    write(run, "node3/worker-7.txt", "another seven\n")
    write(run, "node3/ray/raylet.out", "no memory\n")

    def say(*flags):
        assert dispatch(["logs", str(run.root), *flags]) == 0
        return capsys.readouterr().out

    assert say("--rank", "1") == "one, before\none [now]\n"
    assert say("--worker", "node3:7") == "another seven\n"
    assert say("--worker", "7") == "seven\nanother seven\n"
    table = say()
    assert all(word in table for word in ("node3/ray/raylet.out", "no memory", "one [now]"))
    with pytest.raises(ConfigError, match=r"rank 2 has said nothing .* node1/rank-00000.txt"):
        say("--rank", "2")
    with pytest.raises(ConfigError, match="worker node1:7 has said nothing"):
        say("--worker", "node1:7")
    with pytest.raises(ConfigError, match="one of them"):
        say("--worker", "7", "--rank", "1")


def test_a_run_that_has_not_started_says_so(run):
    with pytest.raises(ConfigError, match="none of its ranks or workers has started"):
        dispatch(["logs", str(run.root)])


def test_what_is_added_is_followed_over_a_full_file_and_a_new_start(run, monkeypatch):
    logs.begin(run)
    path = write(run, "node1/rank-00000.txt", "first\nsec")

    def go_on():
        write(run, "node1/rank-00000.txt", "ond\n")
        path.replace(path.with_name(path.name + ".1"))
        write(run, "node1/rank-00000.txt", "third\n")
        monkeypatch.setenv("SLURM_JOB_ID", "9")
        logs.begin(run)
        write(run, "node2/rank-00000.txt", "fourth\n")

    said = shown.lines(run, 0, None)
    assert next(said) == "first"
    thread = threading.Timer(0.05, go_on)
    thread.start()
    assert list(islice(said, 3)) == ["second", "third", "fourth"]
    thread.join()
    write(run, "node2/worker-1.txt", "of another\n")
    write(run, "node2/rank-00000.txt", "fifth\n")
    assert next(said) == "fifth"
    every = shown.lines(run, None, None)
    assert {next(every) for _ in range(3)} == {
        "node2/rank-00000.txt: fourth",
        "node2/rank-00000.txt: fifth",
        "node2/worker-1.txt: of another",
    }
