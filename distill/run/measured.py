"""What a run measures of itself: metrics.jsonl, a line now and then, and results.json, what an
evaluation found. Standard library only.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distill.config import ConfigError
from distill.run import files, records

# -----------------------------------------------------------------------------------------------
# metrics.jsonl

TAIL_BYTES = 8192  # more than the longest line


@dataclass(frozen=True)
class Metrics(records.Stamped):
    """A line of metrics.jsonl: means over the steps since the line before, over all ranks, unless
    they say otherwise. What was not always noted is None in the lines of older runs.
    """

    step: int  # steps done
    loss: float | None = None  # the weighted total
    terms: dict[str, float] = field(default_factory=dict)  # each before its weight
    lr: float | None = None  # of the last step
    grad_norm: float | None = None  # of the last step, global, before clipping
    # Of the last step, of each weighted term, at the last layer
    term_grad_norms: dict[str, float] | None = None
    samples_per_s: float | None = None  # waiting included
    step_s: float | None = None  # seconds a step, saves left out
    phases_s: dict[str, float] = field(default_factory=dict)  # seconds a step of rank 0, by phase
    data_wait_fraction: float | None = None  # share of the time that rank 0 waited for data
    flops_per_s: float | None = None  # FLOP/s of all ranks by formula
    mfu: float | None = None  # that over what the devices can do; None where unknown
    peak_memory_bytes: int | None = None  # of the rank with the most
    world_size: int = 1  # ranks
    more: dict[str, Any] = records.rest()  # of callbacks, by key


def metrics_of(step: int, values: dict[str, Any]) -> Metrics:
    """The line of now, after `step` steps, from its values by key."""
    return records.record_of(Metrics, {"time": records.now(), "step": step, **values})


def append_metrics(run: files.RunDir, line: Metrics) -> None:
    """Writes a line."""
    files.append_lines(run.metrics, [records.tree_of(line)])


def read_metrics(run: files.RunDir) -> Iterator[Metrics]:
    """The lines in their order; what is none is left out."""
    for tree in files.read_lines(run.metrics):
        try:
            yield records.record_of(Metrics, tree)
        except records.RecordError:
            continue


def last_step(metrics: Path) -> int:
    """Steps done according to the last whole line of metrics.jsonl; 0 when there is none."""
    try:
        lines = files.patiently(partial(_tail, metrics)).splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read()


# -----------------------------------------------------------------------------------------------
# results.json


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sampler, on the same noise as all others; what has no features has no `frechet`, `kid`."""

    nfe: int  # network evaluations an image
    solver: str | None = None  # of a teacher; None: the student
    distance_to_teacher: float  # sum |x - x_1|^2 / sum |x_1 - x_0|^2
    frechet: float | None = None
    kid: float | None = None  # kernel distance: its mean over subsets
    kid_std: float | None = None
    more: dict[str, float] = records.rest()  # of metrics that came later, by key
    seconds_per_1000: float  # images


@dataclass(frozen=True)
class Extractor:
    """What made the features; of "none" nothing else is known."""

    name: str
    sha256: str  # of its weights, or of the sentence that defines it
    features: int | None = None  # how many
    feature_dtype: str | None = None
    moment_dtype: str | None = None
    kid_subsets: int | None = None
    kid_subset_size: int | None = None


@dataclass(frozen=True)
class Reference:
    """The real images; of images that are no pictures the name alone."""

    name: str
    n: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Truth:
    """The teacher's fine solution, in float32, and how far from it the trajectories are."""

    teacher: str
    fingerprint: str  # sha256 of its weights
    guidance: float
    solver: str
    nfe: int
    precision: str = "fp32"  # of the trajectories
    # `distance_to_teacher` of the run's solver in that precision, and in float32
    distance: float | None = None
    distance_in_fp32: float | None = None


@dataclass(frozen=True)
class Cost:
    """What the run has cost (`distill.report.cost.read_cost`)."""

    teacher_device_s: float
    train_device_s: float
    teacher_nfe: int
    bytes: int


@dataclass(frozen=True)
class Results:
    """What was evaluated, and how."""

    run: str
    objective: str
    step: int | None  # of the checkpoint
    settings: dict[str, Any]  # all of eval.*
    model_sha256: str
    teacher: tuple[Row, ...]
    student: tuple[Row, ...]
    n: int  # samples
    seed: int  # of the samples
    extractor: Extractor
    frechet_name: str  # what `frechet` may be called
    reference: Reference
    truth: Truth
    device: str
    cost: Cost
    labels: str = "uniform"  # how often each class was drawn: as in the data, or as often


def write_results(run: files.RunDir, results: Results) -> None:
    """Writes results.json."""
    files.write_json(run.results, records.tree_of(results))


def read_results(run: files.RunDir) -> Results | None:
    """The results; None when there are none.

    Raises:
        ConfigError: the file is not as this version writes it.
    """
    try:
        return records.read_record(Results, run.results)
    except FileNotFoundError:
        return None
    except records.RecordError as error:
        raise ConfigError(f"{error}; make it again with `bowstring evaluate RUN`") from error
