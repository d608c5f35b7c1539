"""The copy of the metrics at Weights & Biases: offline, with the real package where it is there."""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from distill.config import ConfigError
from distill.run.files import RunDir, read_lines
from distill.training.trackers import Wandb, check_wandb, scalars

with_wandb = pytest.mark.skipif(
    find_spec("wandb") is None, reason="wandb is not installed; pip install 'bowstring[wandb]'"
)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No service, no account, and no process of W&B when the test is over."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    import wandb

    with suppress(OSError):  # where the test has killed it
        wandb.teardown()


def records(path: Path) -> Iterator[bytes]:
    """What a .wandb file holds: after a header of 7 bytes, LevelDB's log in blocks of 32 KiB, each
    part with a checksum (4 bytes), its length (2), and whether it is whole, first, middle or last.
    """
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no part begins here
            at += 2**15 - at % 2**15
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            yield record
            record = b""


def written(run: RunDir) -> dict[str, dict[int, dict[str, float]]]:
    """By run id and step, the numbers in W&B's own files of all starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted(run.wandb.glob("offline-run-*/run-*.wandb")):
        steps = found.setdefault(path.stem.removeprefix("run-"), {})
        for record in map(Record.FromString, records(path)):
            if record.WhichOneof("record_type") == "history":
                items = {i.key or i.nested_key[0]: i for i in record.history.item}
                values = {key: json.loads(item.value_json) for key, item in items.items()}
                step = int(values["_step"])
                steps[step] = {k: v for k, v in values.items() if not k.startswith("_")}
    return found


def test_without_the_package_the_setting_is_refused_with_what_to_do(tmp_path, tiny):
    check_wandb("")
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=r"pip install 'bowstring\[wandb\]', or set train.wandb="):
        tiny.fit(tmp_path, 2, wandb="project")


@with_wandb
def test_every_start_goes_on_with_the_same_run_and_writes_the_metrics(tmp_path, tiny, offline):
    settings = {"log_every": 5, "save_every": 10, "wandb": "project"}
    tiny.fit(tmp_path, 10, **settings)
    tiny.fit(tmp_path, 20, **settings)
    run = RunDir(tmp_path)
    assert len(list(run.wandb.glob("offline-run-*"))) == 2
    expected = {line["step"]: dict(scalars(line)) for line in read_lines(run.metrics)}
    for numbers in expected.values():
        del numbers["time"]  # W&B has its own
    found = written(run)
    assert list(found) == [(run.wandb / "id").read_text()]
    assert list(found.values()) == [expected] and list(expected) == [5, 10, 15, 20]


@with_wandb
def test_without_wandb_asked_for_nothing_of_it_starts(tmp_path, tiny, offline):
    tiny.fit(tmp_path, 2)
    assert not RunDir(tmp_path).wandb.exists()


@with_wandb
def test_its_service_may_die_and_the_training_goes_on(tmp_path, tiny, offline):
    """Killed after the first line: the event says so, once, and metrics.jsonl has every line."""
    run, before = RunDir(tmp_path), set(psutil.Process().children(recursive=True))

    def read(step):
        if step == 6:
            started = set(psutil.Process().children(recursive=True)) - before
            assert started
            for process in started:
                process.kill()
        return tiny.batch

    tiny.fit(tmp_path, 20, read, log_every=5, save_every=10, wandb="project")
    assert [line["step"] for line in read_lines(run.metrics)] == [5, 10, 15, 20]
    (event,) = [event for event in read_lines(run.events) if event["kind"] == "wandb"]
    assert event["error"]


@with_wandb
def test_one_whom_the_service_cannot_know_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match=r"train.wandb=project: .* set WANDB_API_KEY") as said:
        Wandb("project", RunDir(tmp_path), {}, print).begin(0)
    assert "too short" not in str(said.value)
