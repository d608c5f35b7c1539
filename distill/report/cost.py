"""What a run has cost so far, from its files. No torch."""

import json
from collections.abc import Iterable

from distill.data.stores.store import open_store
from distill.run import events, files, measured


def read_cost(run: files.RunDir) -> measured.Cost:
    """The cost ledger of measured.json.

    teacher_device_s: seconds workers spent on the committed shards, one device each.
    train_device_s: wall seconds of training times ranks, waiting for data included. Steps that a
    restart repeated
        count again, as they were paid for again.
    teacher_nfe: velocity evaluations of all teachers over all samples (guidance doubles the work
    of one, not the count). bytes: size of the committed shards.
    """
    sidecars = [json.loads(content) for content in open_store(run).sidecars()]
    return measured.Cost(
        teacher_device_s=round(sum((sidecar["seconds"] for sidecar in sidecars), 0.0), 1),
        train_device_s=round(
            train_device_s(events.read_history(run), measured.read_metrics(run)), 1
        ),
        teacher_nfe=sum(sidecar["nfe"] for sidecar in sidecars),
        bytes=sum(sidecar["bytes"] for sidecar in sidecars),
    )


def train_device_s(history: events.History, metrics: Iterable[measured.Metrics]) -> float:
    """Seconds times ranks of all logged training steps, repeated ones included."""
    total, position = 0.0, 0
    for line in _starts_and_steps(history, metrics):
        if isinstance(line, measured.Metrics):
            total += max(0, line.step - position) * (line.step_s or 0.0) * line.world_size
        position = line.step
    return total


def phase_seconds(metrics: Iterable[measured.Metrics]) -> dict[str, float]:
    """Mean seconds of a step in each phase, over logged steps in the order of time."""
    total: dict[str, float] = {}
    position = steps = 0
    for line in metrics:
        if line.phases_s:
            count = max(0, line.step - position)
            steps += count
            for name, seconds in line.phases_s.items():
                total[name] = total.get(name, 0.0) + count * seconds
        position = line.step
    return {name: seconds / steps for name, seconds in total.items()} if steps else {}


def goodput(
    history: events.History, metrics: Iterable[measured.Metrics], now: float | None = None
) -> float | None:
    """Useful step time over the wall time of training, in [0, 1]; None before the first metrics.

    Useful is the time of the steps that the weights come from, each once, without waiting for data.
    Wall time runs from the first start to the last logged step, or to `now` (Unix time): starts,
    saves, waits, steps done again, and any pause between two starts are all in it.
    """
    useful: list[tuple[int, float]] = []  # (last step, seconds) of each line of metrics that counts
    first = last = None
    position = 0
    for line in _starts_and_steps(history, metrics):
        first = line.time if first is None else first
        if isinstance(line, events.Resume):
            useful = [counted for counted in useful if counted[0] <= line.step]
        else:
            seconds = max(0, line.step - position) * (line.step_s or 0.0)
            useful.append((line.step, seconds * (1 - (line.data_wait_fraction or 0.0))))
            last = line.time
        position = line.step
    if first is None or last is None:
        return None
    wall = max(last, now or last) - first
    return min(1.0, sum(seconds for _, seconds in useful) / wall) if wall > 0 else None


def _starts_and_steps(
    history: events.History, metrics: Iterable[measured.Metrics]
) -> list[events.Resume | measured.Metrics]:
    """Starts of the trainer, and logged steps, in the order of time."""
    timed = [line for line in metrics if line.step_s is not None]
    # The sort is stable: a resume comes before the metrics of its second.
    return sorted([*history.starts, *timed], key=lambda line: line.time)
