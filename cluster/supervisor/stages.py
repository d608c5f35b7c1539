"""What each stage of a run still has to do, seen from the run directory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.pool.pool import TeacherPool
from cluster.settings.schema import RunConfig, own_teachers
from cluster.state import done, identity, room
from cluster.supervisor.session import Session
from cluster.trainer.job import TrainJob
from distill.checkpoint.manifest import latest_verified
from distill.config import ConfigError, ImageSpec, check
from distill.data import sidecar
from distill.data.stores.store import open_store
from distill.datasets import images, sets
from distill.evaluation.inception import check_inception
from distill.export.student import latest_student
from distill.networks.config import SameAsTeacherConfig
from distill.networks.files import DESCRIPTION
from distill.report.sections import write_report
from distill.run.files import RunDir
from distill.teachers import base, build
from distill.teachers.config import TeacherConfig
from distill.training.trackers import check_wandb


@dataclass
class Work:
    """Shards to make, a training to run, or both at the same time."""

    pool: TeacherPool | None = None
    job: TrainJob | None = None


def has_model(folder: Path) -> bool:
    """Whether a model was exported there; it appears by rename, so it is whole."""
    return (folder / DESCRIPTION).is_file()


def with_models(config: RunConfig) -> RunConfig:
    """The configuration with the model of its student in place of every teacher that is a run.

    Raises:
        ConfigError: such a run has no student yet.
    """
    teachers = {name: _with_model(teacher) for name, teacher in config.teacher.items()}
    return replace(config, teacher=teachers)


def _with_model(teacher: TeacherConfig) -> TeacherConfig:
    run = RunDir(Path(teacher.path))
    if not teacher.is_from_run or not run.identity.is_file():
        return teacher
    exported = run.root / "student"  # where `bowstring export` puts it
    is_gone = has_model(exported) and latest_verified(run.checkpoints) is None
    return replace(teacher, path=str(exported if is_gone else latest_student(run)))


def with_student(config: RunConfig) -> RunConfig:
    """The configuration with the architecture of its last teacher in place of `student=teacher`.

    Raises:
        ConfigError: that teacher is not there, or no student can start from it.
    """
    if not isinstance(config.student, SameAsTeacherConfig):
        return config
    name, teacher = list(config.teacher.items())[-1]
    check(
        name not in own_teachers(config),
        f"student=teacher, but teacher.{name} is pre-trained by this run, with the student's "
        "architecture: name that, such as student=dit_s",
    )
    found = build.describe(_with_model(teacher))
    if found.network is None:
        raise ConfigError(
            f"student=teacher, but no student can start from teacher.{name}: its kind, or the "
            f"conversion of what it predicts ({'; '.join(found.notes)}), has no network of ours; "
            "name an architecture, such as student=dit_s"
        )
    return replace(config, student=found.network)


# -----------------------------------------------------------------------------------------------
# What there is to do


def pretrain(session: Session, view: done.RunView) -> Work:
    """Training of the run's own teachers, unless they are there or there are none."""
    missing = {n: p for n, p in own_teachers(view.config).items() if not has_model(p)}
    if not missing:
        return Work()
    check(view.config.data.has_images, sets.NO_IMAGES)
    for note in images.check_files(view.config.data, session.bars.say):
        session.bars.say(note)
    job = _job("pretrain", session, view, None)
    made = [job.run.model(step) for step in job.exports]
    for name, folder in missing.items():
        check(
            folder in made,
            f"teacher.{name}.path={folder} is not made by the pre-training, which exports steps "
            f"{job.exports}; add its step to pretrain.export_steps",
        )
    return Work(job=job)


def distil(session: Session, view: done.RunView) -> Work:
    """Shards, and the training on them at the same time."""
    if view.is_distilled:
        return Work()
    spec = run_spec(view, session.bars.say)
    return Work(
        pool=_pool(view, spec, trainer_reads=not view.is_trained),
        job=None if view.is_trained else _job("train", session, view, spec),
    )


def generate(session: Session, view: done.RunView) -> Work:
    """Shards alone."""
    if view.has_all_shards:
        return Work()
    return Work(pool=_pool(view, run_spec(view, session.bars.say), trainer_reads=False))


def train(session: Session, view: done.RunView) -> Work:
    """Training alone, on shards that are there."""
    if view.is_trained:
        return Work()
    return Work(job=_job("train", session, view, run_spec(view, session.bars.say)))


def check_training(config: RunConfig) -> None:
    """Raises ConfigError when a training is to write to a service whose package is absent here."""
    for settings in (config.pretrain.train, config.train):
        check_wandb(settings.wandb)


def check_evaluation(config: RunConfig) -> None:
    """Raises ConfigError when a file that the evaluation needs is absent or another one."""
    images.check_files(config.data)
    if config.eval.extractor.name == "inception":
        check_inception(config.eval.extractor.weights)


def evaluate_if_new(session: Session, view: done.RunView) -> Work:
    """Evaluates and reports, unless the results are those of the last checkpoint."""
    if not view.has_results:
        return evaluate_again(session, view)
    if not session.run.report.exists():
        write_report(session.run, session.config.run.command)
    session.bars.say(f"report: {session.run.report}")
    return Work()


def evaluate_again(session: Session, view: done.RunView) -> Work:
    """Evaluates and reports; leaves nothing to do."""
    # torch-fidelity and torchvision take as long to import as all the rest together, and a run that
    # is resumed should not wait for them.
    from distill.evaluation.evaluate import evaluate

    session.stop_ray()  # the cores are needed
    config = session.config
    evaluate(session.run, config.data, config.teacher, config.eval, config.objective.name)
    session.bars.say(f"report: {write_report(session.run, config.run.command)}")
    return Work()


# -----------------------------------------------------------------------------------------------
# Parts


def run_spec(view: done.RunView, say: Callable[[str], None] = lambda _: None) -> sidecar.ShardSpec:
    """What every shard of the run shares. The fingerprints of its teachers enter run.json.

    `say` is told how their files were read, where that left a choice.

    Raises:
        ConfigError: a teacher is missing, or is not the one the run was started with.
    """
    config = view.config
    for name, folder in own_teachers(config).items():
        check(
            has_model(folder),
            f"teacher.{name} is missing at {folder}; train it first with `bowstring pretrain`",
        )
    prints = {}
    for name, settings in config.teacher.items():
        teacher = build.describe(settings)
        for note in teacher.notes:
            say(f"teacher.{name}: {note}")
        base.check_guidance(teacher.image, settings.guidance)
        check_image(name, teacher.image, config.data.image, is_begun=len(view.shards) > 0)
        prints[name] = teacher.fingerprint
    assert view.record is not None, "check_or_write comes first"
    identity.record_teachers(view.run, view.record, prints)
    return sidecar.shard_spec(
        config.seed, config.data.image, config.trajectory, config.teacher, prints
    )


def check_image(name: str, teacher: ImageSpec, data: ImageSpec, is_begun: bool = False) -> None:
    """Raises ConfigError unless the teacher makes images that the student can learn.

    A run that is begun may be of a version that took a teacher without classes for any data.
    """
    way = ""
    if teacher.shape == data.shape and teacher.num_classes == 0:
        way = "; a student of a teacher without classes has none: set data.num_classes=0"
    elif teacher.shape == data.shape and teacher.num_classes == data.num_classes - 1:
        way = (
            '; if its label table has no row for "none", set '
            f"teacher.{name}.num_classes={data.num_classes}"
        )
    check(
        teacher == data or (is_begun and teacher.shape == data.shape and teacher.num_classes == 0),
        f"teacher.{name} makes {teacher.shape} images of {teacher.num_classes} classes, but "
        f"data={{channels: {data.channels}, size: {data.size}, num_classes: {data.num_classes}}}"
        + way,
    )


def _pool(view: done.RunView, spec: sidecar.ShardSpec, trainer_reads: bool) -> TeacherPool:
    open_store(view.run).clear()
    return TeacherPool(room.check_room(view, trainer_reads), spec, trainer_reads)


def _job(
    stage: str, session: Session, view: done.RunView, spec: sidecar.ShardSpec | None
) -> TrainJob:
    assert view.record is not None, "check_or_write comes first"
    return TrainJob(stage, view.config, spec, session.scratch, view.record.hash)
