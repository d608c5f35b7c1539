"""Evaluation: distance of the student and of the teacher's own solvers to the teacher, by NFE.

Every number comes from the same samples: noise and label of id i are those of (eval.seed, i), ids
0 .. n - 1. The seed must differ from the run's, so no sample was trained on. docs/formats.md
describes results.json.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from distill.config import ImageSpec, check
from distill.datasets import decode, images
from distill.datasets.config import DataConfig
from distill.evaluation import curves, metrics, sampling
from distill.evaluation.config import EvalConfig
from distill.export.student import latest_student
from distill.flow.times import NFE_PER_STEP
from distill.networks.files import WEIGHTS, fingerprint
from distill.report import cost, pictures
from distill.run import files, identity, measured, records
from distill.sample import load_student, to_uint8
from distill.teachers import base, build, config

LINE_PERIOD_S = 30.0  # between lines of progress, where there is no terminal


class Evaluator:
    """Measures samplers on one sample set. Holds what they share: the truth and the real images."""

    def __init__(
        self, data: DataConfig, evaluation: EvalConfig, device: torch.device, progress: Progress
    ) -> None:
        self._evaluation, self._device, self._progress = evaluation, device, progress
        self._next_line_s = time.monotonic() + LINE_PERIOD_S
        self.interrupt = sampling.Interrupt()
        self.features: metrics.FeatureDistance | None = None
        self.real = measured.Reference(data.name)
        self.to_pictures = decode.to_pictures(data, device)
        image, data, counts = data.image, decode.reference(data), None
        if data.image.is_picture:
            real, digest = images.open_images(data), sha256()
            parts = real_parts(data, real, digest.update)
            self.features = metrics.FeatureDistance(evaluation.extractor, parts, device)
            self.real = measured.Reference(data.name, n=len(real), sha256=digest.hexdigest())
            if evaluation.labels == "data" and image.num_classes > 0:
                counts = np.bincount(real.labels, minlength=image.num_classes)
        self.labels = "uniform" if counts is None else "data"
        self.samples = sampling.evaluation_samples(evaluation, image, counts)
        self._reference: tuple[torch.Tensor, float] | None = None

    def draw(
        self, sampler: sampling.Sampler, title: str, samples: sampling.Samples | None = None
    ) -> tuple[torch.Tensor, float]:
        """Images of a sampler for the sample set, or for other `samples`, with a bar."""
        samples = samples or self.samples
        task = self._progress.add_task(title, total=len(samples.noise))
        result = sampling.draw(
            sampler,
            samples,
            self._evaluation.batch_size,
            self._device,
            self.interrupt,
            lambda num: self._advance(task, num),
        )
        self._progress.remove_task(task)
        return result

    def _advance(self, task: TaskID, num: int) -> None:
        """Moves the bar; where there is none, says a line now and then."""
        self._progress.advance(task, num)
        if self._progress.disable and time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_PERIOD_S
            (state,) = self._progress.tasks
            line = f"evaluation, {state.description}: {state.completed:g}/{state.total:g} samples"
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def set_reference(self, sampler: sampling.Sampler) -> None:
        """Takes the end points of `sampler` as the truth."""
        self._reference = self.draw(sampler, "teacher, fine solution")

    def row(
        self, sampler: sampling.Sampler | None, title: str, nfe: int, solver: str | None = None
    ) -> measured.Row:
        """One entry of results.json; for the reference itself when `sampler` is None."""
        assert self._reference is not None
        reference, _ = self._reference
        x, seconds = self.draw(sampler, title) if sampler else self._reference
        tree: dict[str, Any] = {"nfe": nfe} | ({"solver": solver} if solver else {})
        tree |= metrics.measure(
            metrics.Drawn(
                x, reference, self.samples.noise, self.features, self.to_pictures or to_uint8
            )
        )
        return records.record_of(measured.Row, tree | {"seconds_per_1000": 1000 * seconds / len(x)})

    def distance(self, sampler: sampling.Sampler, title: str) -> float:
        """`distance_to_teacher` of a sampler over the first batch of the sample set."""
        assert self._reference is not None
        num = self._evaluation.batch_size
        few = sampling.Samples(self.samples.noise[:num], self.samples.labels[:num])
        x, _ = self.draw(sampler, title, few)
        return metrics.relative_distance(x, self._reference[0][:num], few.noise)


def real_parts(
    data: DataConfig, real: images.Images, seen: Callable[[bytes], None]
) -> Iterator[torch.Tensor]:
    """Real images as uint8, some at a time; the bytes of each part are given to `seen`."""
    for part in images.in_parts(data, real):
        pixels = part if part.dtype == torch.uint8 else to_uint8(part)
        seen(pixels.numpy().tobytes())
        yield pixels


# (solver, NFE) -> the teacher drawn so
TeacherSamplers = Callable[[str, int], sampling.Sampler]


def teacher_samplers(
    teacher: base.FrozenTeacher, settings: config.TeacherConfig, interrupt: sampling.Interrupt
) -> TeacherSamplers:
    """The samplers of a teacher: solvers of its guided field, or a student's own jumps."""
    field = build.build_field(teacher, settings)
    if isinstance(field, base.Jumps):
        u = interrupt.watch(field.mean_velocity)
        middle = field.middle
        return lambda solver, nfe: sampling.student_sampler(u, nfe, middle)
    velocity = interrupt.watch(field)
    return lambda solver, nfe: sampling.teacher_sampler(velocity, solver, nfe)


def teacher_rows(
    evaluator: Evaluator,
    samplers: TeacherSamplers,
    teacher: config.TeacherConfig,
    evaluation: EvalConfig,
) -> tuple[measured.Row, ...]:
    """The teacher's curves (`distill.evaluation.curves`).

    Where one is the fine solution itself, its samples are taken, not drawn again.
    """
    rows = []
    for solver, nfe in curves.teacher_curves(teacher, evaluation):
        is_drawn = (solver, nfe) == curves.truth(teacher, evaluation)
        sampler = None if is_drawn else samplers(solver, nfe)
        rows.append(evaluator.row(sampler, f"teacher, {solver}, {nfe} NFE", nfe, solver))
    return tuple(rows)


def trajectory_distances(
    evaluator: Evaluator,
    samplers: TeacherSamplers,
    settings: config.TeacherConfig,
    device: torch.device,
) -> dict[str, float]:
    """How far from the fine solution the trajectories are, and were they made in float32, over one
    batch. Nothing where they are; `samplers` are of the teacher in float32.
    """
    if settings.precision in ("auto", "fp32"):  # auto is for a run to settle
        return {}
    nfe = settings.steps * NFE_PER_STEP[settings.solver]
    made = build.build_teacher(settings, device)
    drawn = teacher_samplers(made, settings, evaluator.interrupt)
    both = {"distance": drawn, "distance_in_fp32": samplers}
    return {
        key: evaluator.distance(of(settings.solver, nfe), f"trajectories, {key}")
        for key, of in both.items()
    }


def picture_grid(
    run: files.RunDir,
    evaluator: Evaluator,
    image: ImageSpec,
    draw_student: Callable[[int], sampling.Sampler],
    samplers: TeacherSamplers,
    teacher: config.TeacherConfig,
) -> None:
    """Writes samples/grid.npz and a PNG: a row per sampler, the same noise and label down a
    column."""
    num = curves.grid_columns(len(evaluator.samples.noise), image)
    labels = evaluator.samples.labels[:num]
    if image.num_classes > 0:  # every class once, in order
        labels = torch.arange(num)
    rows = {
        f"{who},{how},{nfe}": samplers(how, nfe) if who == "teacher" else draw_student(nfe)
        for who, how, nfe in curves.grid_rows(teacher)
    }
    chosen = sampling.Samples(evaluator.samples.noise[:num], labels)
    assert evaluator.to_pictures is not None
    drawn = torch.stack(
        [
            evaluator.to_pictures(evaluator.draw(sampler, "pictures", chosen)[0])
            for sampler in rows.values()
        ]
    ).numpy()
    pictures.write_npz(
        run.samples / "grid.npz",
        {"images": drawn, "labels": labels.numpy(), "rows": np.array(list(rows))},
    )
    pictures.write_png(
        run.samples / "grid.png", pictures.tile(drawn.reshape(-1, *drawn.shape[2:]), columns=num)
    )


def evaluate(
    run: files.RunDir,
    data: DataConfig,
    teachers: dict[str, config.TeacherConfig],
    evaluation: EvalConfig,
    objective: str,
    device: str | None = None,
) -> measured.Results:
    """The content of results.json, which it writes: the curves of the last verified checkpoint.

    The last of `teachers`, the best, is the reference, with its guidance. The same run and
    settings give the same numbers, timings apart. Also writes samples/grid.npz and
    samples/grid.png.

    Raises:
        ConfigError: eval.seed equals the run's seed, no checkpoint, extractor weights missing or
        not the published ones.
    """
    check(
        evaluation.seed != identity.record_of(run).seed,
        f"eval.seed={evaluation.seed} is the seed of the run, so its samples were trained on; "
        "choose another eval.seed",
    )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = latest_student(run)
    student = load_student(folder, place)
    name, settings = list(teachers.items())[-1]
    exact = replace(settings, precision="fp32")
    teacher = build.build_teacher(exact, place)
    with progress_bar() as progress:
        evaluator = Evaluator(data, evaluation, place, progress)
        samplers = teacher_samplers(teacher, settings, evaluator.interrupt)
        u = evaluator.interrupt.watch(student.network)

        def draw_student(nfe: int) -> sampling.Sampler:
            return sampling.student_sampler(u, nfe, student.middle)

        solver, nfe = curves.truth(settings, evaluation)
        evaluator.set_reference(samplers(solver, nfe))
        student_rows = tuple(
            evaluator.row(draw_student(n), f"student, {n} NFE", n) for n in evaluation.nfe
        )
        solvers = teacher_rows(evaluator, samplers, settings, evaluation)
        distances = trajectory_distances(evaluator, samplers, settings, place)
        if evaluator.to_pictures:
            picture_grid(run, evaluator, student.image, draw_student, samplers, settings)
    features = evaluator.features
    extractor = (
        measured.Extractor(**features.description) if features else measured.Extractor("none", "")
    )
    results = measured.Results(
        run=run.root.name,
        objective=objective,
        step=student.meta.get("step"),
        settings=asdict(evaluation),
        model_sha256=fingerprint(folder / WEIGHTS),
        teacher=solvers,
        student=student_rows,
        n=evaluation.num_samples,
        seed=evaluation.seed,
        labels=evaluator.labels,
        extractor=extractor,
        frechet_name=metrics.distance_name(extractor.name, evaluation.num_samples),
        reference=evaluator.real,
        truth=measured.Truth(
            name,
            teacher.fingerprint,
            settings.guidance,
            solver,
            nfe,
            settings.precision if distances else "fp32",
            **distances,
        ),
        device=str(place),
        cost=cost.read_cost(run),
    )
    measured.write_results(run, results)
    return results


def progress_bar() -> Progress:
    """A bar on a terminal; elsewhere it is not drawn."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
