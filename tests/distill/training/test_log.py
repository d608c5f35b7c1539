"""What a training says of itself: phases, speed, spikes, event files, traces."""

import gzip
import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.noise import sample_noise
from distill.networks.build import build_network
from distill.objectives.build import build_objective
from distill.objectives.config import ReflowConfig, TraFlowConfig
from distill.report.cost import phase_seconds
from distill.run.files import RunDir, read_lines
from distill.run.measured import Metrics, read_metrics
from distill.training import timing as phases
from distill.training.callbacks import Step
from distill.training.log import FEWEST, HISTORY, Flops, TrainLog, stands_out
from distill.training.timing import PHASES, PhaseClock
from distill.training.trackers import scalars

CPU = torch.device("cpu")


@pytest.fixture
def fit(tiny):
    """Trains to a step; its run directory."""

    def fit(root, steps, objective=None, **settings):
        settings = {"log_every": 5, "save_every": 10, **settings}
        tiny.fit(root, steps, objective=objective, **settings)
        return RunDir(root)

    return fit


def events(run, kind):
    return [event for event in read_lines(run.events) if event["kind"] == kind]


# -----------------------------------------------------------------------------------------------
# Phases and speed


def test_every_target_is_logged_with_its_loss_and_its_pull(fit, tmp_path):
    """Of steps after which metrics are written; weighted, the losses are the whole."""
    config = TraFlowConfig()
    run = fit(tmp_path, 10, objective=build_objective(config, 0))
    lines = list(read_metrics(run))
    assert [line.step for line in lines] == [5, 10]
    for line in lines:
        assert line.terms.keys() == line.term_grad_norms.keys() == config.shares().keys()
        whole = sum(share * line.terms[name] for name, share in config.shares().items())
        assert line.loss == pytest.approx(whole, rel=1e-5)
        pulls = line.term_grad_norms.values()  # of four samples, which draw four kinds at most
        assert sum(pull > 0 for pull in pulls) >= 2 and all(math.isfinite(p) for p in pulls)


def test_a_clock_gives_every_second_to_one_phase(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = PhaseClock(CPU)
    for phase in ("data", "forward", "data"):
        clock.enter(phase)
    none = dict.fromkeys(PHASES, 0.0)
    assert clock.read() == none | {"other": 1.0, "data": 2.0 + 4.0, "forward": 3.0}
    assert clock.read() == none | {"data": 5.0}  # it goes on
    assert clock.read() == none | {"data": 6.0}


def test_metrics_say_where_the_time_goes_and_what_was_achieved(tmp_path, fit):
    run = fit(tmp_path, 20)
    lines = list(read_lines(run.metrics))
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line in lines:
        spent = line["phases_s"]
        assert set(spent) == set(PHASES)
        assert all(spent[name] > 0 for name in ("data", "forward", "backward", "optimizer"))
        # The save of step 10 belongs to the line after it, and not to the time of its steps.
        assert (spent["save"] > 0) == (line["step"] == 15)
        assert line["flops_per_s"] == pytest.approx(1e3 * line["samples_per_s"])
        assert line["mfu"] == pytest.approx(line["flops_per_s"] / 1e6)
        assert line["peak_memory_bytes"] > 10**7


def test_mfu_is_said_only_against_a_known_peak(tmp_path, tiny):
    unknown = Flops(per_sample=1e3, peak_per_s=0.0)
    tiny._replace(flops=unknown).fit(tmp_path, 5, log_every=5)
    (line,) = read_lines(RunDir(tmp_path).metrics)
    assert line["flops_per_s"] > 0 and "mfu" not in line


def test_a_mean_step_is_weighted_by_steps():
    metrics = [
        Metrics(10, phases_s={"forward": 1.0, "save": 0.0}),
        Metrics(40, phases_s={"forward": 2.0, "save": 0.4}),
    ]
    assert phase_seconds(metrics) == pytest.approx({"forward": 1.75, "save": 0.3})
    assert phase_seconds([Metrics(10)]) == {}


# -----------------------------------------------------------------------------------------------
# Spikes


def test_noise_is_no_spike_and_a_fivefold_loss_is_one():
    noise = sample_noise(0, np.arange(5000), (1,))[:, 0]  # the same on any machine, for ever
    losses = np.exp(0.3 * noise) / (1 + np.arange(5000) / 500)
    before = [losses[max(0, step - HISTORY) : step].tolist() for step in range(5000)]
    assert not any(map(stands_out, losses.tolist(), before))
    assert all(stands_out(5 * float(np.median(b)), b) for b in before[FEWEST:])
    assert not stands_out(1e9, before[FEWEST - 1])  # too little to compare with


class SpikeAt:
    """The usual loss, many times as large at one step."""

    def __init__(self, step):
        self.inner, self.step = build_objective(ReflowConfig(), 0), step

    def loss(self, batch, student, target, step):
        result = self.inner.loss(batch, student, target, step)
        factor = 100.0 if step == self.step else 1.0
        result.weights = {name: factor * weight for name, weight in result.weights.items()}
        return result


def test_a_spike_is_named_with_its_step_and_ids(tmp_path, fit):
    run = fit(tmp_path, 30, SpikeAt(22))
    (spike,) = events(run, "spike")
    assert (spike["step"], spike["rank"], spike["ids"]) == (22, 0, [0, 1, 2, 3])
    assert spike["loss"] > 10 * spike["median"] > 0


class RankZeroOfTwo(TorchEngine):
    """Of two ranks; whatever this one has, the other has ten times."""

    world_size = 2

    def gather(self, values):
        return torch.stack([values, values * 10])


def test_the_rank_with_the_largest_loss_is_named(tmp_path, tiny):
    config = TrainConfig()
    engine = RankZeroOfTwo(build_network(tiny.network, tiny.image), config, CPU)
    log = TrainLog(engine, RunDir(tmp_path), lambda: 0.0, None)
    log.begin(100)
    log.enter("data")
    for index in range(100, 120):
        value = torch.tensor(50.0 if index == 118 else 1.0)
        log.step(Step(index, tiny.batch, value, {"a": value}, lr=1e-3, grad_norm=1.0, pulls={}))
    log.record(120, log.measure(120))
    (spike,) = events(RunDir(tmp_path), "spike")
    assert (spike["step"], spike["rank"], spike["ids"]) == (118, 1, [0, 10, 20, 30])
    assert (spike["loss"], spike["median"]) == (275.0, 5.5)
    (line,) = read_lines(RunDir(tmp_path).metrics)
    assert line["loss"] == pytest.approx((19 * 5.5 + 275) / 20)


# -----------------------------------------------------------------------------------------------
# TensorBoard and traces


def test_event_files_hold_the_metrics_and_no_step_twice(tmp_path, fit):
    run = fit(tmp_path, 15)
    (run.checkpoints / "step_00000015").rename(tmp_path / "lost")
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    fit(tmp_path, 20)  # from step 10 on
    metrics = list(read_lines(run.metrics))
    assert [line["step"] for line in metrics] == [5, 10, 15, 15, 20]
    last = {line["step"]: dict(scalars(line)) for line in metrics if line.pop("time")}
    found = EventAccumulator(str(run.tensorboard)).Reload()
    assert set(found.Tags()["scalars"]) == set(last[20])
    for tag in last[20]:
        values = {event.step: event.value for event in found.Scalars(tag)}
        assert [event.step for event in found.Scalars(tag)] == [5, 10, 15, 20]
        assert values == pytest.approx({step: line[tag] for step, line in last.items()}, rel=1e-6)


def test_a_trace_of_three_steps_is_written_when_asked_for(tmp_path, fit):
    assert not fit(tmp_path / "plain", 10).profile.exists()
    run = fit(tmp_path / "traced", 10, profile=True)
    (path,) = run.profile.iterdir()
    assert path.name == "step_00000002-rank_00000.json.gz"
    with gzip.open(path) as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in set(names)) == 3
    assert "aten::addmm" in names or "aten::mm" in names
