"""Evaluation: distance of the student and of the teacher's own solvers to the teacher, by NFE.

Every number comes from the same samples: noise and label of id i are those of (eval.seed, i), ids
0 .. n - 1. The seed must differ from the run's, so no sample was trained on. docs/formats.md
describes results.json.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from distill.config import (
    NFE_PER_STEP,
    DataConfig,
    EvalConfig,
    ImageSpec,
    TeacherConfig,
    check,
)
from distill.cost import read_cost
from distill.curves import (
    TRUTH_SOLVER,
    grid_columns,
    grid_rows,
    is_truth,
    reference_nfe,
    teacher_curves,
)
from distill.datasets import load_images
from distill.export import latest_student, read_identity
from distill.metrics import FeatureDistance, distance_name, relative_distance
from distill.models import fingerprint
from distill.noise import sample_labels, sample_noise
from distill.pictures import tile, write_npz, write_png
from distill.rundir import RunDir, write_json
from distill.sample import Student, few_step, load_student, to_uint8
from distill.solvers import solve
from distill.teachers import build_teacher
from distill.teachers.base import guided

# (noise [B, C, H, W], label [B]) -> image [B, C, H, W]
Sampler = Callable[[Tensor, Tensor], Tensor]
# v(x, t [B], label) -> velocity
TeacherVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """The fixed sample set of an evaluation, on the CPU."""

    noise: Float[Tensor, "N *S"]
    labels: Int[Tensor, "N"]


def evaluation_samples(evaluation: EvalConfig, image: ImageSpec) -> Samples:
    """Noise and labels of the ids 0 .. num_samples - 1 of eval.seed."""
    ids = np.arange(evaluation.num_samples)
    noise = sample_noise(evaluation.seed, ids, image.shape)
    labels = sample_labels(evaluation.seed, ids, image.num_classes)
    return Samples(torch.from_numpy(noise), torch.from_numpy(labels))


def student_sampler(student: Student, nfe: int) -> Sampler:
    """Samples of the student at `nfe` jumps."""
    return lambda noise, labels: few_step(student.network, noise, labels, nfe)


def teacher_sampler(velocity: TeacherVelocity, solver: str, nfe: int) -> Sampler:
    """End points of the teacher's ODE at `nfe` evaluations of its velocity, on the uniform grid."""
    steps, rest = divmod(nfe, NFE_PER_STEP[solver])
    assert steps > 0 and rest == 0

    @torch.no_grad()
    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        times = torch.tensor([0.0, 1.0], device=noise.device)
        return solve(
            lambda x, t: velocity(x, t.expand(len(x)), labels), noise, times, solver, steps
        )[-1]

    return sample


def draw(
    sampler: Sampler,
    samples: Samples,
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda num: None,
) -> tuple[Float[Tensor, "N *S"], float]:
    """Images for all samples, float32 on the CPU, and seconds. `advance` hears of each batch.

    On a CPU each core takes whole batches: threads inside every small operation would mostly wait
    for each other. The batches, and so the numbers, do not depend on the number of cores.
    """
    noise, labels = samples.noise.split(batch_size), samples.labels.split(batch_size)

    def run(noise: Tensor, labels: Tensor) -> Tensor:
        return sampler(noise.to(device), labels.to(device)).float().cpu()

    started, parts = time.perf_counter(), []
    num_jobs = len(noise) if device.type == "cpu" else 1
    with cores(num_jobs) as workers, ThreadPoolExecutor(workers) as pool:
        for part in pool.map(run, noise, labels):
            parts.append(part)
            advance(len(part))
    return torch.cat(parts), time.perf_counter() - started


@contextmanager
def cores(num_jobs: int) -> Iterator[int]:
    """Threads to run jobs in, one per core; meanwhile torch takes one core per operation."""
    before = torch.get_num_threads()
    workers = min(len(os.sched_getaffinity(0)), num_jobs)
    torch.set_num_threads(1 if workers > 1 else before)
    try:
        yield workers
    finally:
        torch.set_num_threads(before)


class Evaluator:
    """Measures samplers on one sample set. Holds what they share: the truth and the real images."""

    def __init__(
        self, data: DataConfig, evaluation: EvalConfig, device: torch.device, progress: Progress
    ) -> None:
        self._evaluation, self._device, self._progress = evaluation, device, progress
        self.samples = evaluation_samples(evaluation, data.image)
        self.features: FeatureDistance | None = None
        self.real_description: dict[str, Any] = {"name": data.name}
        if data.image.is_picture:
            real = to_uint8(load_images(data)[0])
            self.features = FeatureDistance(evaluation.extractor, real, device)
            self.real_description |= {
                "n": len(real),
                "sha256": sha256(real.numpy().tobytes()).hexdigest(),
            }
        self._reference: tuple[Tensor, float] | None = None

    def draw(self, sampler: Sampler, title: str) -> tuple[Tensor, float]:
        """Images of a sampler for the sample set, with a bar."""
        task = self._progress.add_task(title, total=len(self.samples.noise))
        result = draw(
            sampler,
            self.samples,
            self._evaluation.batch_size,
            self._device,
            lambda num: self._progress.advance(task, num),
        )
        self._progress.remove_task(task)
        return result

    def set_reference(self, sampler: Sampler) -> None:
        """Takes the end points of `sampler` as the truth."""
        self._reference = self.draw(sampler, "teacher, fine solution")

    def row(self, sampler: Sampler | None, title: str) -> dict[str, float]:
        """One entry of results.json; for the reference itself when `sampler` is None."""
        assert self._reference is not None
        reference, _ = self._reference
        x, seconds = self.draw(sampler, title) if sampler else self._reference
        row = {"distance_to_teacher": relative_distance(x, reference, self.samples.noise)}
        if self.features is not None:
            row |= self.features.compare(to_uint8(x))
        return row | {"seconds_per_1000": 1000 * seconds / len(x)}


def teacher_rows(
    evaluator: Evaluator, velocity: TeacherVelocity, own_solver: str, evaluation: EvalConfig
) -> list[dict[str, Any]]:
    """The teacher's curves (`distill.curves`).

    Where the own solver is the fine solution itself, its samples are taken, not drawn again.
    """
    rows = []
    for solver, nfe in teacher_curves(own_solver, evaluation):
        is_drawn = is_truth(solver, nfe, evaluation)
        sampler = None if is_drawn else teacher_sampler(velocity, solver, nfe)
        row = evaluator.row(sampler, f"teacher, {solver}, {nfe} NFE")
        rows.append({"nfe": nfe, "solver": solver} | row)
    return rows


def picture_grid(
    run: RunDir, student: Student, velocity: TeacherVelocity, solver: str, samples: Samples
) -> None:
    """Writes samples/grid.npz and a PNG: a row per sampler, the same noise and label down a
    column."""
    num = grid_columns(len(samples.noise), student.image)
    labels = samples.labels[:num]
    if student.image.num_classes > 0:  # every class once, in order
        labels = torch.arange(num)
    rows = {
        f"{who},{how},{nfe}": teacher_sampler(velocity, how, nfe)
        if who == "teacher"
        else student_sampler(student, nfe)
        for who, how, nfe in grid_rows(solver)
    }
    chosen = Samples(samples.noise[:num], labels)
    images = torch.stack(
        [to_uint8(draw(sampler, chosen, num, student.device)[0]) for sampler in rows.values()]
    ).numpy()
    write_npz(
        run.samples / "grid.npz",
        {"images": images, "labels": labels.numpy(), "rows": np.array(list(rows))},
    )
    write_png(run.samples / "grid.png", tile(images.reshape(-1, *images.shape[2:]), columns=num))


def evaluate(
    run: RunDir,
    data: DataConfig,
    teachers: dict[str, TeacherConfig],
    evaluation: EvalConfig,
    objective: str,
    device: str | None = None,
) -> dict[str, Any]:
    """The content of results.json, which it writes: the curves of the last verified checkpoint.

    The last of `teachers`, the best, is the reference, with its guidance. The same run and
    settings give the same numbers, timings apart. Also writes samples/grid.npz and
    samples/grid.png.

    Raises:
        ConfigError: eval.seed equals the run's seed, no checkpoint, extractor weights missing or
        not the published ones.
    """
    check(
        evaluation.seed != read_identity(run)["seed"],
        f"eval.seed={evaluation.seed} is the seed of the run, so its samples were trained on; "
        "choose another eval.seed",
    )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = latest_student(run)
    student = load_student(folder, place)
    name, config = list(teachers.items())[-1]
    teacher = build_teacher(config, place)
    velocity = guided(teacher, config.guidance)
    with progress_bar() as progress:
        evaluator = Evaluator(data, evaluation, place, progress)
        truth = teacher_sampler(velocity, TRUTH_SOLVER, reference_nfe(evaluation))
        evaluator.set_reference(truth)
        student_rows = [
            {"nfe": n} | evaluator.row(student_sampler(student, n), f"student, {n} NFE")
            for n in evaluation.nfe
        ]
        curves = teacher_rows(evaluator, velocity, config.solver, evaluation)
        if student.image.is_picture:
            picture_grid(run, student, velocity, config.solver, evaluator.samples)
    features = evaluator.features
    extractor: dict[str, Any] = {"name": "none", "sha256": ""}
    if features:
        extractor = features.description
    results = {
        "run": run.root.name,
        "objective": objective,
        "step": student.meta.get("step"),
        "settings": asdict(evaluation),
        "model_sha256": fingerprint(folder),
        "teacher": curves,
        "student": student_rows,
        "n": evaluation.num_samples,
        "seed": evaluation.seed,
        "extractor": extractor,
        "frechet_name": distance_name(extractor["name"], evaluation.num_samples),
        "reference": evaluator.real_description,
        "truth": {
            "teacher": name,
            "fingerprint": teacher.fingerprint,
            "guidance": config.guidance,
            "solver": TRUTH_SOLVER,
            "nfe": reference_nfe(evaluation),
        },
        "device": str(place),
        "cost": read_cost(run),
    }
    write_json(run.results, results)
    return results


def progress_bar() -> Progress:
    """A bar on a terminal; silent elsewhere."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
