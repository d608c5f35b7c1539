"""The supervisor: one process that starts, watches and ends everything a run needs.

    (pre-training) -> [ teacher pool  ||  trainer group ] -> evaluation -> report

Every stage looks at the run directory first and does what is missing, so the same command starts a
run, resumes it after any kill, and recognises it as finished. Verbs return an exit code: 0 done, or
saved and stopped as asked; 1 failed; 75 stopped as asked, but the last steps were not saved; 130
interrupted.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from cluster.pool.pool import TeacherPool
from cluster.settings import file, schema
from cluster.slurm import site
from cluster.state import cursor, done, identity
from cluster.supervisor import stages
from cluster.supervisor.arrays import Arrays
from cluster.supervisor.group import POLL_PERIOD_S, RunFailed, TrainerGroup
from cluster.supervisor.session import Session, Stopped, open_session
from cluster.trainer.job import stop_file
from distill.checkpoint.manifest import CheckpointError
from distill.config import ConfigError
from distill.run import events, files, measured

logger = logging.getLogger(__name__)

NOT_SAVED = os.EX_TEMPFAIL  # 75: to start again helps

Stage = Callable[[Session, done.RunView], stages.Work]

# -----------------------------------------------------------------------------------------------
# Verbs


def run(config: schema.RunConfig) -> int:
    """The main job: what is missing of teacher, trajectories, training, evaluation and report."""
    stages.check_training(config)
    stages.check_evaluation(config)  # of the last stage, but better said now
    return supervise(config, stages.pretrain, stages.distil, stages.evaluate_if_new)


def distil(config: schema.RunConfig) -> int:
    """The main job without evaluation and report: a Slurm job of their own makes these."""
    stages.check_training(config)
    stages.check_evaluation(config)
    return supervise(config, stages.pretrain, stages.distil)


def pretrain(config: schema.RunConfig) -> int:
    """Trains the run's own teacher."""
    stages.check_training(config)
    return supervise(config, stages.pretrain)


def generate(config: schema.RunConfig) -> int:
    """Makes all shards of the run, without waiting for a trainer."""
    return supervise(config, stages.generate)


def train(config: schema.RunConfig) -> int:
    """Trains the student on the shards that are there."""
    stages.check_training(config)
    return supervise(config, stages.train)


def evaluate(config: schema.RunConfig) -> int:
    """Evaluates the last verified checkpoint, and writes the report."""
    stages.check_evaluation(config)  # before its settings are kept
    return supervise(config, stages.evaluate_again)


def supervise(config: schema.RunConfig, *chosen: Stage) -> int:
    """Exit code of the stages, one after the other, under the run's lock.

    Raises:
        SystemExit: a signal ended it. A command that has more runs to do does not start them.
    """
    given, config = config, stages.with_models(done.with_absolute_paths(config))
    with open_session(config, config.files) as session:
        record, notes = identity.check_or_write(config, session.run)
        for note in [*notes, *site.grace_words(config, session.run)]:
            session.bars.say(note)
        file.save_config(session.run, given)
        view = done.RunView(config, session.run, record)
        try:
            for stage in chosen:
                with session.stopping_at_once():
                    work = stage(session, view)
                if work != stages.Work():
                    _work(session, work)
                    view = view.again()
        except Stopped:
            raise SystemExit(_say_stopped(session, str(given.run.dir))) from None
        except Exception as error:  # the supervisor's one broad net: a failure is an exit code
            with suppress(OSError):  # a full disk may be what it failed of
                events.append(session.run, events.Failed(str(error)))
            if isinstance(error, ConfigError | CheckpointError):
                raise
            logger.debug("the run failed", exc_info=True)
            session.bars.say(f"error: {error}")
            return 1
    return 0


def _say_stopped(session: Session, folder: str) -> int:
    """Says that a signal ended the run; the exit code."""
    if session.unsaved:
        with suppress(OSError):
            events.append(session.run, events.Unsaved(session.unsaved))
        session.bars.say(f"the ranks did not save: {session.unsaved}")
    session.bars.say(f"stopped; the same command goes on with {folder}")
    if session.stop_signal == signal.SIGINT:
        return 128 + signal.SIGINT
    return NOT_SAVED if session.unsaved else 0


# -----------------------------------------------------------------------------------------------
# The loop


def _work(session: Session, work: stages.Work) -> None:
    """Runs the pool and the trainer group until both are done.

    Raises:
        Stopped: a signal came, and the trainer has saved.
        RunFailed, PoolError, ConfigError, CheckpointError: it cannot go on.
    """
    pool, job = work.pool, work.job
    session.start_ray()
    if session.stop_signal:
        raise Stopped
    group = TrainerGroup(session, job) if job else None
    before = measured.last_step(job.run.metrics) if job else 0
    teachers = Arrays(session.run)
    try:
        with session.bars:
            produced = trained = False
            while not (produced and trained):
                produced = pool is None or pool.poll()
                trained = group is None or group.poll()
                if pool is not None:
                    teachers.follow(produced)
                with files.next_time():
                    _show(session, pool, group, before)
                while pool is not None and pool.notes:
                    session.bars.say(pool.notes.pop(0))
                if session.stop_signal:
                    raise Stopped
                if lost := session.lost_daemon():
                    raise RunFailed(
                        f"Ray's {lost} has died, out of memory perhaps (see dmesg); the same "
                        "command goes on from the last verified checkpoint" + session.ray_words()
                    )
                if pool is None:
                    time.sleep(POLL_PERIOD_S)
                else:
                    pool.rest(POLL_PERIOD_S)
            with files.next_time():
                _show(session, pool, group, before)
    finally:
        stop_file(session.scratch).touch()
        answers = not session.lost_daemon()
        if pool is not None and answers:
            pool.close()
        try:
            if group is not None:
                session.unsaved = group.wait(session.config.cluster.stop_grace_s)
        finally:
            stop_file(session.scratch).unlink()


def _show(
    session: Session, pool: TeacherPool | None, group: TrainerGroup | None, before: int
) -> None:
    """Sets the bars. `before` is where the training stood when this process came."""
    if pool is not None:
        state = pool.coordinator
        note = "waits for the trainer" if state.is_blocked else ""
        session.bars.show("trajectory shards", state.num_made, state.limits.num_shards, note)
    if group is not None:
        job = group.job
        title = "teacher, steps" if job.stage == "pretrain" else "student, steps"
        step, note = measured.last_step(job.run.metrics), ""
        if step == before < job.train.max_steps:
            note = "starting"
        if job.stage == "train":
            note = cursor.read_cursor(job.run).waiting_for or note
        session.bars.show(title, step, job.train.max_steps, group.note or note)
