"""results.json: what an evaluation found. Standard library only."""

from dataclasses import dataclass, field
from typing import Any

from distill.config import ConfigError
from distill.run import files, records
from distill.run.dir import RunDir


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sampler, on the same noise as all others; what has no features has no `frechet`, `kid`."""

    nfe: int  # network evaluations an image
    solver: str | None = None  # of a teacher; None: the student
    distance_to_teacher: float  # sum |x - x_1|^2 / sum |x_1 - x_0|^2
    frechet: float | None = None
    kid: float | None = None  # kernel distance: its mean over subsets
    kid_std: float | None = None
    more: dict[str, float] = field(
        default_factory=dict, metadata=records.REST
    )  # of metrics that came later, by key
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
    """The teacher's fine solution."""

    teacher: str
    fingerprint: str  # sha256 of its weights
    guidance: float
    solver: str
    nfe: int


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


def write_results(run: RunDir, results: Results) -> None:
    """Writes results.json."""
    files.write_json(run.results, records.tree_of(results))


def read_results(run: RunDir) -> Results | None:
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
