"""The model card of an export: README.md, from run.json, results.json and the run's pictures.

Its front matter is what model hubs read. What a run does not know, such as a licence, it says.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from distill.export.student import TrainedStudent
from distill.report.sections import duration, number, row_name
from distill.run import files, identity, measured

CARD, PICTURES = "README.md", "pictures.png"


class Use(NamedTuple):
    """How an export is used.

    Attributes:
        library: that opens it, as a hub knows it.
        how: a few lines that draw images.
        language: that they are in.
        dtype: of the weights.
    """

    library: str
    how: str
    language: str = "python"
    dtype: str = "float32"


def write_card(
    folder: Path, run: files.RunDir, student: TrainedStudent, use: Use, license_id: str = "unknown"
) -> None:
    """Writes README.md, and beside it the pictures of the evaluation where there are some.

    Raises:
        ConfigError: run.json or results.json cannot be read.
    """
    record, results = identity.record_of(run), measured.read_results(run)
    pictures = run.samples / "overview.png"
    if pictures.is_file():
        shutil.copyfile(pictures, folder / PICTURES)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.export"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("card.md.jinja").render(
        **use._asdict(),
        **_about_model(student, record),
        **_about_quality(results),
        license=license_id,
        run=student.meta["run"],
        step=student.meta["step"],
        version=version("bowstring"),
        has_pictures=pictures.is_file(),
    )
    files.write_atomic(folder / CARD, text.encode())


def _about_model(student: TrainedStudent, record: identity.RunRecord) -> dict[str, Any]:
    """What run.json and the network say."""
    network, settings = student.network, record.identity
    image, train = network.image, settings.get("train", {})
    objective = {key: value for key, value in settings["objective"].items() if key != "name"}
    versions = [f"{name} {found}" for name, found in record.versions.items()]
    return {
        "network": type(network).__name__,
        "parameters": number(sum(parameter.numel() for parameter in network.parameters())),
        "shape": " x ".join(str(extent) for extent in image.shape),
        "classes": image.num_classes,
        "teachers": [
            _teacher(name, settings.get("teacher", {}).get(name, {}), found)
            for name, found in record.teachers.items()
        ],
        "data": f"`{settings['data']['name']}`",
        "objective": settings["objective"]["name"],
        "settings": _listed(objective) or "no settings",
        "training": _listed({"steps": student.meta["step"], **train}),
        "hash": record.hash,
        "versions": ", ".join(versions),
    }


def _teacher(name: str, settings: dict[str, Any], fingerprint: str) -> str:
    """A teacher in one line, without its path, which is a machine's own."""
    said = {key: value for key, value in settings.items() if key not in ("kind", "path")}
    return f"`{name}` {settings.get('kind', '')} (sha256 `{fingerprint[:16]}`): {_listed(said)}"


def _about_quality(results: measured.Results | None) -> dict[str, Any]:
    """What results.json says: a row for every sampler."""
    if results is None:
        return {"rows": [], "cost": ""}
    columns = {"distance_to_teacher": "distance to teacher"}
    rows = results.student + results.teacher
    if any(row.frechet is not None for row in rows):
        columns |= {"frechet": results.frechet_name, "kid": "kernel distance"}
    columns["seconds_per_1000"] = "s per 1,000 images"
    cost = results.cost
    return {
        "columns": columns.values(),
        "rows": [
            [row_name(row, results), row.nfe, *(number(getattr(row, key)) for key in columns)]
            for row in rows
        ],
        "evaluated_step": results.step,
        "samples": number(results.n),
        "seed": results.seed,
        "device": results.device,
        "truth": f"{results.truth.solver}, {results.truth.nfe} evaluations",
        "frechet": results.frechet_name,
        "extractor": results.extractor,
        "reference": results.reference if results.reference.n else None,
        "cost": f"{_hours(cost.teacher_device_s)} of teachers "
        f"({number(cost.teacher_nfe)} evaluations), {_hours(cost.train_device_s)} of training",
    }


def _hours(device_s: float) -> str:
    return f"{number(device_s / 3600)} device hours ({duration(device_s)})"


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items() if value != "")
