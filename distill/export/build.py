"""A student in the format that somebody else's tools open."""

from pathlib import Path

from distill.config import check
from distill.export.card import Use, write_card
from distill.export.student import TrainedStudent, check_place, read_student, save_trained
from distill.run.files import RunDir

HOW_OURS = """from distill.sample import load_student

student = load_student(FOLDER)
images = student.sample(16, nfe=2)"""


def export_student(
    run: RunDir, form: str, out: Path, overwrite: bool, dtype: str, license_id: str
) -> Path:
    """`out`, now with the student of the run's last verified checkpoint, seen whole or not at all.

    Raises:
        ConfigError: `out` is there already, the run has no checkpoint, or a package is missing.
        CheckpointError: no checkpoint verifies.
        LossyExport: what was written does not give what was trained.
    """
    check(
        form == "diffusers" or dtype == "fp32",
        f"--dtype {dtype} is for --format diffusers; {form} is written in fp32",
    )
    check_place(out, overwrite)
    student = read_student(run)
    match form:
        case "diffusers":
            from distill.export.diffusers import export_diffusers

            return export_diffusers(run, student, out, dtype, license_id)
        case "onnx" | "torch":
            from distill.export import graph

            write = graph.export_onnx if form == "onnx" else graph.export_program
            return write(run, student, out, license_id)
    return _export_folder(run, student, out, license_id)


def _export_folder(run: RunDir, student: TrainedStudent, out: Path, license_id: str) -> Path:
    def add_card(folder: Path) -> None:
        write_card(folder, run, student, Use("bowstring", HOW_OURS), license_id)

    return save_trained(out, student.network, student.meta, add_card)
