"""What each stage of a run has to do, seen from the run directory. Empty-handed when it is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from distill.ledger import ShardSpec, committed

from cluster.config import RunConfig
from cluster.identity import is_own, record_teachers
from cluster.job import TrainJob, stream_order
from cluster.plan import StreamPlan, stream_plan
from cluster.pool import TeacherPool
from cluster.session import Session
from distill.config import check
from distill.evaluate import evaluate
from distill.manifest import latest_verified
from distill.models import DESCRIPTION
from distill.report import write_report
from distill.rundir import RunDir
from distill.teachers import build_teacher


@dataclass
class Work:
    """Shards to make, a training to run, or both at the same time."""

    pool: TeacherPool | None = None
    job: TrainJob | None = None


# -----------------------------------------------------------------------------------------------
# What there is


def own_teachers(config: RunConfig) -> dict[str, Path]:
    """Model folders of the teachers that this run pre-trains itself, by teacher name."""
    return {
        name: Path(teacher.path)
        for name, teacher in config.teacher.items()
        if teacher.kind == "native" and is_own(teacher.path, config.run.dir)
    }


def has_model(folder: Path) -> bool:
    """Whether a model was exported there; it appears by rename, so it is whole."""
    return (folder / DESCRIPTION).is_file()


def steps_done(run: RunDir) -> int:
    """Step of the newest verified checkpoint.

    Raises:
        CheckpointError: checkpoints exist and none verifies.
    """
    found = latest_verified(run.checkpoints)
    return found[0] if found else 0


def num_committed(session: Session, plan: StreamPlan) -> int:
    """Shards of the run on disk."""
    return sum(shard < plan.shards for shard in committed(session.run))


def results_are_current(session: Session) -> bool:
    """Whether results.json is of the last checkpoint and the evaluation asked for."""
    try:
        results = json.loads(session.run.results.read_text())
    except (FileNotFoundError, ValueError):
        return False
    asked = session.config.eval
    found = (results.get("step"), results.get("n"), results.get("seed"))
    return found == (steps_done(session.run), asked.num_samples, asked.seed)


# -----------------------------------------------------------------------------------------------
# What there is to do


def pretrain(session: Session) -> Work:
    """Training of the run's own teachers, unless they are there or there are none."""
    missing = {n: p for n, p in own_teachers(session.config).items() if not has_model(p)}
    if not missing:
        return Work()
    job = TrainJob("pretrain", session.config, None, session.scratch)
    made = [job.run.model(step) for step in job.exports]
    for name, folder in missing.items():
        check(
            folder in made,
            f"teacher.{name}.path={folder} is not made by the pre-training, which exports steps "
            f"{job.exports}; add its step to pretrain.export_steps",
        )
    return Work(job=job)


def distil(session: Session) -> Work:
    """Shards, and the training on them at the same time."""
    config, plan = session.config, stream_plan(session.config)
    is_trained = steps_done(session.run) >= config.train.max_steps
    if is_trained and num_committed(session, plan) == plan.shards:
        return Work()
    spec = shard_spec(session)
    return Work(
        pool=_pool(session, spec, plan, trainer_reads=not is_trained),
        job=None if is_trained else TrainJob("train", config, spec, session.scratch),
    )


def generate(session: Session) -> Work:
    """Shards alone."""
    plan = stream_plan(session.config)
    if num_committed(session, plan) == plan.shards:
        return Work()
    return Work(pool=_pool(session, shard_spec(session), plan, trainer_reads=False))


def train(session: Session) -> Work:
    """Training alone, on shards that are there."""
    if steps_done(session.run) >= session.config.train.max_steps:
        return Work()
    return Work(job=TrainJob("train", session.config, shard_spec(session), session.scratch))


def evaluate_if_new(session: Session) -> Work:
    """Evaluates and reports, unless the results are those of the last checkpoint."""
    if not results_are_current(session):
        return evaluate_again(session)
    if not session.run.report.exists():
        write_report(session.run, session.config.run.command)
    session.bars.say(f"report: {session.run.report}")
    return Work()


def evaluate_again(session: Session) -> Work:
    """Evaluates and reports; leaves nothing to do."""
    session.stop_ray()  # the cores are needed
    config = session.config
    evaluate(session.run, config.data, config.teacher, config.eval, config.objective.name)
    session.bars.say(f"report: {write_report(session.run, config.run.command)}")
    return Work()


# -----------------------------------------------------------------------------------------------
# Parts


def shard_spec(session: Session) -> ShardSpec:
    """What every shard of the run shares. The fingerprints of its teachers enter run.json.

    Raises:
        ConfigError: a teacher is missing, or is not the one the run was started with.
    """
    config = session.config
    for name, folder in own_teachers(config).items():
        check(
            has_model(folder),
            f"teacher.{name} is missing at {folder}; train it first with `bowstring pretrain`",
        )
    prints = {n: build_teacher(t, "cpu").fingerprint for n, t in config.teacher.items()}
    record_teachers(session.run, prints)
    return ShardSpec.of(config, prints)


def _pool(session: Session, spec: ShardSpec, plan: StreamPlan, trainer_reads: bool) -> TeacherPool:
    trajectory = session.config.trajectory
    assert plan.blocks == stream_order(session.config).num_blocks(session.config.train.max_steps)
    check(
        plan.num_bytes <= trajectory.max_bytes,
        f"trajectory.max_bytes={trajectory.max_bytes:,} is less than the {plan.num_bytes:,} bytes "
        f"of the {plan.shards} shards of this run; raise it, or train fewer steps",
    )
    return TeacherPool(session.config, session.run, spec, plan, trainer_reads)
