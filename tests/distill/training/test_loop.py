"""Training as a function: resumed equals uninterrupted, losses are the recorded ones."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_training import EVERY_TERM, IMAGE, NETWORK, fit_all, read_share
from torch.utils._python_dispatch import TorchDispatchMode

from distill.checkpoint.manifest import committed_steps
from distill.config import ConfigError, TrainConfig
from distill.engine.engine import TorchEngine
from distill.flow.trajectory import TrajectoryBatch
from distill.networks.build import build_network
from distill.objectives.base import LossTerms
from distill.objectives.build import build_objective
from distill.objectives.config import ReflowConfig, TraFlowConfig
from distill.run.files import RunDir, read_lines
from distill.training.loop import TrainingError, learning_rate

GOLDEN = Path(__file__).parent / "golden_losses.json"


def config_of(**settings) -> TrainConfig:
    defaults = {"max_steps": 10, "batch_size": 8, "log_every": 1, "save_every": 4, "lr": 2e-3}
    return TrainConfig(**{**defaults, **settings})


def fit(
    root: Path,
    config: TrainConfig,
    objective=None,
    stop_after: int | None = None,
    engine=None,
    num_batches: int = 10**6,
):
    network = build_network(NETWORK, IMAGE, seed=3)
    engine = engine or TorchEngine(network, config, torch.device("cpu"))
    seen = []

    def counted(step: int) -> TrajectoryBatch | None:
        if len(seen) == num_batches:  # told to stop while it waited for the next one
            return None
        seen.append(step)
        return read_share(step, 0, 1)

    done = fit_all(
        engine,
        counted,
        objective or build_objective(EVERY_TERM, 0),
        config,
        root,
        {"seed": 0, "config_hash": "ab"},
        should_stop=lambda: stop_after is not None and len(seen) >= stop_after,
    )
    return engine, done, seen


def losses(root: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(RunDir(root).metrics)}


def state(engine) -> dict[tuple[str, str], torch.Tensor]:
    return {(f.kind, f.name): f.data.clone() for f in engine.fragments()}


def test_ten_losses_are_the_recorded_ones(tmp_path):
    fit(tmp_path, config_of())
    found = [losses(tmp_path)[step] for step in range(1, 11)]
    if os.environ.get("WRITE_FIXTURE"):
        GOLDEN.write_text(json.dumps(found) + "\n")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


def test_four_and_six_steps_are_ten_steps(tmp_path):
    whole, _, _ = fit(tmp_path / "whole", config_of())
    _, done, _ = fit(tmp_path / "parts", config_of(), stop_after=4)
    assert done == 4
    resumed, done, seen = fit(tmp_path / "parts", config_of())
    assert (done, seen) == (10, [4, 5, 6, 7, 8, 9])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for key, value in state(whole).items():
        assert torch.equal(value, state(resumed)[key]), key
    windows = [e for e in read_lines(RunDir(tmp_path / "parts").events) if e["kind"] == "steps"]
    assert [(w["first"], w["last"]) for w in windows] == [(i, i) for i in range(10)]


def test_a_stop_while_data_are_waited_for_saves_the_steps_so_far(tmp_path):
    whole, _, _ = fit(tmp_path / "whole", config_of())
    _, done, seen = fit(tmp_path / "parts", config_of(log_every=5), num_batches=3)
    assert (done, seen) == (3, [0, 1, 2])
    assert list(committed_steps(RunDir(tmp_path / "parts").checkpoints)) == [3]
    _, done, _ = fit(tmp_path / "parts", config_of(), num_batches=0)  # it has nothing to save
    assert done == 3
    resumed, done, seen = fit(tmp_path / "parts", config_of())
    assert (done, seen) == (10, [3, 4, 5, 6, 7, 8, 9])
    for key, value in state(whole).items():
        assert torch.equal(value, state(resumed)[key]), key


def test_micro_batches_are_the_whole_batch(tmp_path):
    whole, _, _ = fit(tmp_path / "whole", config_of())
    parts, _, _ = fit(tmp_path / "parts", config_of(micro_batch=2))
    for key, value in state(whole).items():
        torch.testing.assert_close(value, state(parts)[key], rtol=1e-3, atol=1e-5)


def test_a_finished_run_does_nothing_more(tmp_path):
    fit(tmp_path, config_of())
    _, done, seen = fit(tmp_path, config_of())
    assert (done, seen) == (10, [])


def test_a_loss_that_is_not_finite_stops_with_names_and_keeps_the_state(tmp_path):
    inner = build_objective(ReflowConfig(), 0)

    class Breaks:
        def loss(self, batch, student, target, step):
            result = inner.loss(batch, student, target, step)
            if step == 6:
                result.terms["flow_matching"] *= float("nan")
            return result

    with pytest.raises(TrainingError, match=r"step 6: .*flow_matching.*\[48, 49"):
        fit(tmp_path, config_of(), Breaks())
    assert max(committed_steps(RunDir(tmp_path).checkpoints)) == 6
    assert len(losses(tmp_path)) == 6


class SteepAt:
    """The healthy loss, but at one step the gradient of a term whose value is 0 is not a number."""

    def __init__(self, step: int) -> None:
        self.inner, self.step = build_objective(ReflowConfig(), 0), step

    def loss(self, batch, student, target, step):
        result = self.inner.loss(batch, student, target, step)
        zero = 0 * result.terms["flow_matching"]
        result.terms["steep"] = zero.sqrt() if step == self.step else zero
        result.weights["steep"] = 1.0
        return result


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    config = config_of(save_every=3)
    healthy, _, _ = fit(tmp_path / "healthy", config, SteepAt(-1))
    with pytest.raises(TrainingError, match=r"step 5: the gradient .*\['steep'\].*\[40, 41"):
        fit(tmp_path / "broken", config, SteepAt(5))
    assert max(committed_steps(RunDir(tmp_path / "broken").checkpoints)) == 5
    assert max(losses(tmp_path / "broken")) == 5
    resumed, done, seen = fit(tmp_path / "broken", config, SteepAt(-1))
    assert (done, seen) == (10, [5, 6, 7, 8, 9])
    for key, value in state(healthy).items():
        assert torch.equal(value, state(resumed)[key]), key


def test_a_term_is_named_whose_gradient_spoils_the_weights_of_all(tmp_path):
    """Adaptive weights are made of gradients: every term is finite, and the loss is not."""

    class Balanced(SteepAt):
        def loss(self, batch, student, target, step):
            result = super().loss(batch, student, target, step)
            norms = self.gradient_norms(list(result.terms.values()))
            return LossTerms(dict(zip(result.terms, norms, strict=True)), result.terms)

    engine = TorchEngine(build_network(NETWORK, IMAGE, seed=3), config_of(), torch.device("cpu"))
    objective = Balanced(0)
    objective.gradient_norms = engine.gradient_norms
    with pytest.raises(TrainingError, match=r"step 0: the loss .*gradients of terms \['steep'\]"):
        fit(tmp_path, config_of(), objective, engine=engine)


def test_a_dropped_step_leaves_no_trace(tmp_path):
    engine, _, _ = fit(tmp_path, config_of(max_steps=2))
    before = state(engine)
    x, one = torch.ones(2, *IMAGE.shape), torch.ones(2)
    output = engine.student(x, 0 * one, one, one.long())
    engine.backward((0 * output.sum()).sqrt(), last=True)
    assert not math.isfinite(engine.step(2, 1e-3))
    for key, value in before.items():
        assert torch.equal(value, state(engine)[key]), key
    engine.backward(engine.student(x, 0 * one, one, one.long()).square().mean(), last=True)
    assert math.isfinite(engine.step(2, 1e-3))  # the bad gradient is gone


def test_the_record_of_what_was_read_is_never_behind_a_checkpoint(tmp_path):
    class Breaks:
        def loss(self, batch, student, target, step):
            result = build_objective(ReflowConfig(), 0).loss(batch, student, target, step)
            result.weights["flow_matching"] *= float("nan") if step == 6 else 1.0
            return result

    with pytest.raises(TrainingError):
        fit(tmp_path, config_of(log_every=5), Breaks())
    windows = [e for e in read_lines(RunDir(tmp_path).events) if e["kind"] == "steps"]
    assert [(w["first"], w["last"]) for w in windows] == [(0, 3), (4, 4), (5, 5)]


@pytest.mark.parametrize(
    ("ranks", "micro", "words"),
    [
        (
            3,
            0,
            r"3 ranks \(cluster.trainer.num_workers\) cannot share train.batch_size=16.*; 2 can",
        ),
        (4, 8, "evenly in micro-batches of 8; 2 can"),
        (1, 5, "evenly in micro-batches of 5; set another train.micro_batch"),
    ],
)
def test_a_batch_that_ranks_cannot_share_names_a_number_that_can(ranks, micro, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(batch_size=16, micro_batch=micro).accumulation(ranks)


def test_the_learning_rate_is_a_function_of_the_step():
    config = config_of(max_steps=100, warmup_steps=9, lr=1.0)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(50, config) == pytest.approx(0.5)
    assert learning_rate(99, config) < 1e-3


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: values of tensors that become Python's."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        self.count += op.overloadpacket in reads
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", [TraFlowConfig(), ReflowConfig()], ids=lambda o: o.name)
def test_a_step_synchronises_with_the_device_for_its_flags_and_its_norm_alone(objective, tmp_path):
    """The norm is one value that becomes Python's; the flags come as one list, by `gather`."""
    config, gathered, counts = config_of(max_steps=6, log_every=3, save_every=6), [], []

    class Engine(TorchEngine):
        def gather(self, values):
            gathered.append(values)
            return super().gather(values)

        def step(self, step, lr):
            norm = super().step(step, lr)
            counts.append((reads.count, len(gathered)))
            return norm

    engine = Engine(build_network(NETWORK, IMAGE, seed=3), config, torch.device("cpu"))
    batches = [read_share(step, 0, 1) for step in range(6)]
    with Reads() as reads:
        fit_all(
            engine,
            batches.__getitem__,
            build_objective(objective, 0),
            config,
            tmp_path,
            {"seed": 0},
        )
    between = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counts)]
    assert [between[i] for i in (0, 3)] == [(1, 1)] * 2  # steps that are not logged
