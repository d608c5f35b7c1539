"""What hangs on the loop: the order of the hooks as a theorem, and callbacks of a user's own."""

import ast
import math
from dataclasses import dataclass, field
from inspect import getsource
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as some
from small_training import Reads, read_share
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from thread_ranks import errors

from distill.checkpoint.manifest import SaveError
from distill.config import ConfigError, TrainConfig
from distill.engine.engine import TorchEngine
from distill.objectives.base import LossTerms
from distill.run.files import RunDir, read_lines
from distill.training import callbacks, loop
from distill.training.callbacks import Callback, Everyone, Step
from distill.training.loop import TrainingError, train
from distill.training.saving import Exporter

# -----------------------------------------------------------------------------------------------
# A callback of one's own


class WorstLoss(Callback):
    """Remembers the samples of the largest loss, and adds it to the metrics."""

    def __init__(self) -> None:
        self.loss, self.ids = -math.inf, []

    def step(self, step: Step) -> None:
        if float(step.loss) > self.loss:
            self.loss, self.ids = float(step.loss), step.batch.ids.tolist()

    def measure(self, done: int) -> dict[str, Any]:
        return {"worst_loss": self.loss}


def test_ten_lines_see_every_step_and_add_to_what_is_recorded(tmp_path, tiny):
    seen, worst = [], WorstLoss()

    class Counts(Callback):
        def step(self, step: Step) -> None:
            seen.append((step.index, float(step.loss), step.lr > 0 and step.grad_norm > 0))

    tiny.fit(tmp_path, 10, more=[worst, Counts()], log_every=2)
    assert len(getsource(WorstLoss).strip().splitlines()) <= 12
    assert [index for index, _, _ in seen] == list(range(10)) and all(ok for _, _, ok in seen)
    losses = [loss for _, loss, _ in seen]
    lines = list(read_lines(RunDir(tmp_path).metrics))
    for number, line in enumerate(lines):
        two = losses[2 * number : 2 * number + 2]
        assert line["loss"] == pytest.approx(sum(two) / 2)
        assert line["worst_loss"] == max(losses[: 2 * number + 2])
    assert worst.loss == max(losses) and worst.ids == tiny.batch.ids.tolist()
    found = EventAccumulator(str(RunDir(tmp_path).tensorboard)).Reload().Scalars("worst_loss")
    assert [event.step for event in found] == [2, 4, 6, 8, 10]


class Evaluates(Callback):
    """What an evaluation in the middle of a training needs: at its steps, before they are saved."""

    def __init__(self, engine, batch, every):
        self.engine, self.batch, self.every = engine, batch, every

    def wants_save(self, done):
        return done % self.every == 0

    def measure(self, done):
        if done % self.every:
            return {}
        x_0, one = self.batch.noise, torch.ones(len(self.batch.ids))
        end = x_0 + self.engine.evaluation(x_0, 0 * one, one, self.batch.condition)
        return {"evaluation": {"distance": float((end - self.batch.best[:, -1]).square().mean())}}


def test_an_evaluation_can_hang_on_the_loop(tmp_path, tiny):
    config = TrainConfig(batch_size=4)
    engine = TorchEngine(tiny.new_network(), config, torch.device("cpu"))
    evaluates = Evaluates(engine, tiny.batch, 6)
    tiny.fit(tmp_path, 12, engine=engine, more=[evaluates], log_every=4, save_every=12)
    lines = {line["step"]: line for line in read_lines(RunDir(tmp_path).metrics)}
    assert list(lines) == [4, 6, 8, 12]
    assert [step for step, line in lines.items() if "evaluation" in line] == [6, 12]
    (last,) = evaluates.measure(12)["evaluation"].values()
    assert last == lines[12]["evaluation"]["distance"] != lines[6]["evaluation"]["distance"]


def test_the_loop_knows_no_callback_so_a_new_one_touches_no_other_file():
    for module, allowed in ((loop, {"distill.training.callbacks"}), (callbacks, set())):
        names = {n.module for n in ast.walk(ast.parse(getsource(module))) if is_from(n)}
        assert {n for n in names if n.startswith("distill.training")} == allowed
        assert not any(n.startswith(("distill.checkpoint", "distill.export")) for n in names)


def is_from(node):
    return isinstance(node, ast.ImportFrom)


# -----------------------------------------------------------------------------------------------
# The order of the hooks


@dataclass
class Plan:
    """What happens to a training, by step."""

    max_steps: int
    start: int
    log_every: int
    save_every: int
    exports: set[int]
    overflows: dict[int, int]  # how often the step is dropped before it is taken
    end: str  # done | stop | wait | loss | gradient | save
    at: int  # the step at which it ends otherwise than done
    order: list[int]  # of the callbacks

    @property
    def last(self) -> int:
        """Steps done at the end."""
        if self.end == "done" or not self.start <= self.at < self.max_steps:
            return self.max_steps
        return self.at + (self.end == "stop")

    @property
    def fails(self) -> bool:
        return self.end in ("loss", "gradient", "save") and self.last < self.max_steps


@some.composite
def plans(draw):
    max_steps = draw(some.integers(1, 12))
    steps = some.integers(1, max_steps)
    start = draw(some.one_of(some.just(0), some.integers(0, max_steps)))
    return Plan(
        max_steps,
        start=start,
        log_every=draw(some.integers(1, 5)),
        save_every=draw(some.integers(1, 7)),
        exports=draw(some.sets(steps, max_size=3)),
        overflows=draw(some.dictionaries(steps, some.integers(1, 2), max_size=2)),
        end=draw(some.sampled_from(["done", "stop", "wait", "loss", "gradient", "save"])),
        at=draw(some.integers(start, max_steps)),
        order=draw(some.permutations(range(3))),
    )


class ScriptedEngine(TorchEngine):
    """One process without a network; its steps come out as the plan says."""

    def __init__(self, plan):
        self.device, self.background, self.fixed = torch.device("cpu"), self, {}
        self.plan, self.left = plan, dict(plan.overflows)

    def backward(self, loss, last):
        pass

    def has_finite_gradient(self, loss):
        return True

    def gradient_norms(self, losses):
        return torch.zeros(len(losses))

    def step(self, step, lr):
        self.overflowed = self.left.get(step, 0) > 0
        self.left[step] = self.left.get(step, 0) - 1
        return math.nan if (self.plan.end, self.plan.at) == ("gradient", step) else 1.0


@dataclass
class Listens(Callback):
    """Writes down every hook that it is called at."""

    number: int
    plan: Plan
    calls: list = field(default_factory=list)  # (hook, argument, number) of all callbacks
    unrecorded: int = 0

    def note(self, hook, argument=None):
        self.calls.append((hook, argument, self.number))

    def begin(self, done):
        self.note("begin", done)

    def enter(self, phase):
        self.note("enter", phase)

    def step(self, step):
        self.note("step", step.index)
        self.unrecorded += 1

    def measure(self, done):
        self.note("measure", done)
        return {"unrecorded": self.unrecorded} if self.unrecorded else {}

    def record(self, done, metrics):
        self.note("record", done)
        assert metrics == {"unrecorded": self.unrecorded}
        self.unrecorded = 0

    def save(self, done):
        self.note("save", done)
        assert self.unrecorded == 0

    def saved(self, done):
        self.note("saved", done)

    def wait(self):
        self.note("wait")

    def close(self):
        self.note("close")


class Saves(Listens):
    """And saves, in the background, where a save may fail."""

    def wants_save(self, done):
        return done % self.plan.save_every == 0 or done == self.plan.max_steps

    @property
    def has_failed(self):
        steps = self.calls.count(("enter", "data", self.number))
        return self.plan.end == "save" and steps > 0 and self.plan.start + steps - 1 == self.plan.at

    def wait(self):
        super().wait()
        if self.has_failed:
            raise SaveError("no space left")


class Exports(Listens):
    """And exports what was saved."""

    def wants_save(self, done):
        return done in self.plan.exports


def walk(plan):
    """The calls of all callbacks; what the training came to."""
    calls, step, batch = [], -1, read_share(0, 0, 1, size=4)

    def read(number):
        nonlocal step
        step = number
        return None if (plan.end, plan.at) == ("wait", number) else batch

    class Scripted:
        def loss(self, batch, student, target, step):
            value = math.inf if (plan.end, plan.at) == ("loss", step) else 1.0
            return LossTerms({"a": 1.0}, {"a": torch.tensor(value)})

    config = TrainConfig(
        max_steps=plan.max_steps, batch_size=4, log_every=plan.log_every, save_every=plan.save_every
    )
    kinds = [Listens, Saves, Exports]
    everyone = [kinds[kind](number, plan, calls) for number, kind in enumerate(plan.order)]
    stops = lambda: (plan.end, plan.at) == ("stop", step)  # noqa: E731
    parts = (ScriptedEngine(plan), Reads(read), Scripted(), config, everyone)
    try:
        return calls, train(*parts, start=plan.start, should_stop=stops)
    except (TrainingError, SaveError) as error:
        return calls, error


def of_one(calls):
    """(hook, argument) of the calls that the first callback had."""
    return [call[:2] for call in calls if call[2] == 0]


def arguments(calls, hook):
    return [argument for name, argument in of_one(calls) if name == hook]


theorem = settings(deadline=None, max_examples=200)


@theorem
@given(plan=plans())
def test_every_step_is_seen_once_and_what_stops_a_training_is_said(plan):
    """However often it was tried before it was taken; one that was not taken is not seen."""
    calls, came_to = walk(plan)
    assert arguments(calls, "step") == list(range(plan.start, plan.last))
    assert of_one(calls)[0] == ("begin", plan.start)
    if not plan.fails:
        assert came_to == plan.last
    elif plan.end == "save":
        assert isinstance(came_to, SaveError)
    else:
        what = f"step {plan.at}: the {plan.end} is not finite"
        assert isinstance(came_to, TrainingError) and what in str(came_to)


@theorem
@given(plan=plans())
def test_what_was_done_is_recorded_then_saved_then_exported(plan):
    """In whatever order the callbacks stand: all hear a hook before anybody hears the next."""
    calls, came_to = walk(plan)
    heard, closed = calls[:-3], calls[-3:]
    assert closed == [("close", None, number) for number in (2, 1, 0)]
    if isinstance(came_to, SaveError):  # not all hear of a wait at which one of them raises
        heard = [call for call in heard if call[0] != "wait"]
    for at in range(0, len(heard), 3):
        assert heard[at : at + 3] == [(*heard[at][:2], number) for number in range(3)]
    one = of_one(calls)
    for at in [at for at, (hook, _) in enumerate(one) if hook == "save"]:
        done = one[at][1]
        assert arguments(calls[: calls.index(("save", done, 0))], "measure")[-1] == done
        assert one[at - 1 : at + 2] == [("enter", "save"), ("save", done), ("saved", done)]


@theorem
@given(plan=plans())
def test_it_is_saved_when_that_is_due_and_however_it_ends(plan):
    """But once a save has failed. The last save is waited for, and only then an error is raised."""
    calls, _ = walk(plan)
    steps = range(plan.start + 1, plan.last + 1)
    asked = [d for d in steps if d % plan.save_every == 0 or d in {*plan.exports, plan.max_steps}]
    if plan.fails and plan.end == "save":
        assert arguments(calls, "save") == asked
        return
    gives_up = plan.fails  # it saves once more then, wherever it stands
    more = [plan.last] if gives_up or (steps and plan.last not in asked) else []
    assert arguments(calls, "save") == asked + more
    assert of_one(calls)[-2:] == [("wait", None), ("close", None)]


@theorem
@given(plan=plans())
def test_every_step_is_on_record_at_the_end_and_every_few_steps(plan):
    """But those after the last record when a save has failed."""
    calls, _ = walk(plan)
    recorded = arguments(calls, "record")
    steps = range(plan.start + 1, plan.last + 1)
    assert {d for d in steps if d % plan.log_every == 0} <= {*recorded}
    if steps and not (plan.fails and plan.end == "save"):
        assert recorded[-1] == plan.last


def test_all_are_closed_though_one_fails_at_it():
    closed = []

    class Fails(Callback):
        def close(self):
            closed.append(self)
            raise OSError("full")

    everyone = [Fails(), Fails(), Fails()]
    with pytest.raises(OSError, match="full"):
        Everyone(everyone).close()
    assert closed == everyone[::-1]


# -----------------------------------------------------------------------------------------------
# Exports on several ranks


@pytest.fixture
def exporter(tmp_path, tiny):
    """(ranks, steps) -> the exporter of one rank; there is no checkpoint."""

    def build(ranks, steps, wait=lambda: None):
        engine = TorchEngine(tiny.new_network(), TrainConfig(), torch.device("cpu"))
        engine.rank, engine.world_size = ranks.rank, ranks.world_size
        engine.any, engine.gather = ranks.any, ranks.gather
        return Exporter(engine, RunDir(tmp_path), steps, tiny.network, tiny.image, {}, wait)

    return build


def test_all_ranks_say_that_a_model_is_gone(exporter):
    found = errors(3, lambda ranks: exporter(ranks, [2, 4]).begin(3))
    assert [type(error) for error in found] == [ConfigError] * 3
    assert all("step_00000002 is missing" in str(error) for error in found)


def test_all_ranks_say_that_a_model_could_not_be_written(exporter, monkeypatch):
    waited = []

    def full(*args):
        assert waited
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.training.saving.export_checkpoint", full)
    found = errors(3, lambda ranks: exporter(ranks, [2], lambda: waited.append(1)).saved(2))
    assert [type(error) for error in found] == [SaveError] * 3
    assert len(waited) == 3 and all("No space left" in str(error) for error in found)
    assert errors(3, lambda ranks: exporter(ranks, [4]).saved(2)) == [None] * 3
