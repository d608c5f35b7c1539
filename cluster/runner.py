"""The supervisor: one process that starts, watches and ends everything a run needs.

    (pre-training) -> [ teacher pool  ||  trainer group ] -> evaluation -> report

Every stage looks at the run directory first and does what is missing, so the same command starts a
run, resumes it after any kill, and recognises it as finished. Verbs return an exit code: 0 done, or
saved and stopped as asked; 1 failed; 130 interrupted.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from cluster import stages
from cluster.config import RunConfig
from cluster.configfile import save_config
from cluster.cursor import read_cursor
from cluster.facts import steps_done, with_absolute_paths
from cluster.identity import check_or_write
from cluster.job import TrainJob, stop_file
from cluster.pool import TeacherPool
from cluster.progress import last_step
from cluster.session import Session, Stopped, open_session
from cluster.stages import Work
from cluster.trainer import final_error, fit
from cluster.watchdog import has_hung
from distill.config import ConfigError
from distill.manifest import CheckpointError
from distill.rundir import append_line, write_atomic

logger = logging.getLogger(__name__)

POLL_PERIOD_S = 0.1
STOP_GRACE_S = 120.0  # for the last checkpoint after a stop signal
STARVED_GRACE_S = 3.0
PROBE_BYTES = 2**16  # written before a training starts again


class RunFailed(RuntimeError):
    """A stage ended for good. The message says why."""


Stage = Callable[[Session], Work]

# -----------------------------------------------------------------------------------------------
# Verbs


def run(config: RunConfig) -> int:
    """The main job: what is missing of teacher, trajectories, training, evaluation and report."""
    stages.check_evaluation(config)  # of the last stage, but better said now
    return supervise(config, stages.pretrain, stages.distil, stages.evaluate_if_new)


def distil(config: RunConfig) -> int:
    """The main job without evaluation and report: a Slurm job of their own makes these."""
    stages.check_evaluation(config)
    return supervise(config, stages.pretrain, stages.distil)


def pretrain(config: RunConfig) -> int:
    """Trains the run's own teacher."""
    return supervise(config, stages.pretrain)


def generate(config: RunConfig) -> int:
    """Makes all shards of the run, without waiting for a trainer."""
    return supervise(config, stages.generate)


def train(config: RunConfig) -> int:
    """Trains the student on the shards that are there."""
    return supervise(config, stages.train)


def evaluate(config: RunConfig) -> int:
    """Evaluates the last verified checkpoint, and writes the report."""
    stages.check_evaluation(config)  # before its settings are kept
    return supervise(config, stages.evaluate_again)


def supervise(config: RunConfig, *chosen: Stage) -> int:
    """Exit code of the stages, one after the other, under the run's lock.

    Raises:
        SystemExit: a signal ended it. A command that has more runs to do does not start them.
    """
    given, config = config, stages.with_models(with_absolute_paths(config))
    with open_session(config, config.files) as session:
        for note in check_or_write(config, session.run):
            session.bars.say(note)
        save_config(session.run, given)
        try:
            for stage in chosen:
                with session.stopping_at_once():
                    work = stage(session)
                _work(session, work)
        except Stopped:
            session.bars.say(f"stopped; the same command goes on with {given.run.dir}")
            interrupted = session.stop_signal == signal.SIGINT
            raise SystemExit(128 + signal.SIGINT if interrupted else 0) from None
        except (ConfigError, CheckpointError):
            raise
        except Exception as error:  # the supervisor's one broad net: a failure is an exit code
            logger.debug("the run failed", exc_info=True)
            with suppress(OSError):  # a full disk may be what it failed of
                append_line(session.run.events, {"kind": "failed", "error": str(error)})
            session.bars.say(f"error: {error}")
            return 1
    return 0


# -----------------------------------------------------------------------------------------------
# The loop


def _work(session: Session, work: Work) -> None:
    """Runs the pool and the trainer group until both are done.

    Raises:
        Stopped: a signal came, and the trainer has saved.
        RunFailed, PoolError, ConfigError, CheckpointError: it cannot go on.
    """
    pool, job = work.pool, work.job
    if pool is None and job is None:
        return
    session.start_ray()
    if session.stop_signal:
        raise Stopped
    group = TrainerGroup(session, job) if job else None
    before = last_step(job.run.metrics) if job else 0
    try:
        with session.bars:
            produced = trained = False
            while not (produced and trained):
                produced = pool is None or pool.poll()
                trained = group is None or group.poll()
                _show(session, pool, job, before)
                if session.stop_signal:
                    raise Stopped
                if lost := session.lost_daemon():
                    raise RunFailed(
                        f"Ray's {lost} has died, out of memory perhaps (see dmesg); the same "
                        "command goes on from the last verified checkpoint"
                    )
                if pool is None:
                    time.sleep(POLL_PERIOD_S)
                else:
                    pool.rest(POLL_PERIOD_S)
            _show(session, pool, job, before)
    finally:
        stop_file(session.scratch).touch()
        answers = not session.lost_daemon()
        if pool is not None and answers:
            pool.close()
        if group is not None and answers:
            group.wait(STOP_GRACE_S)
        stop_file(session.scratch).unlink()


def _show(session: Session, pool: TeacherPool | None, job: TrainJob | None, before: int) -> None:
    """Sets the bars. `before` is where the training stood when this process came."""
    if pool is not None:
        state = pool.coordinator
        note = "waits for the trainer" if state.is_blocked else ""
        session.bars.show("trajectory shards", state.num_made, state.limits.num_shards, note)
    if job is not None:
        title = "teacher, steps" if job.stage == "pretrain" else "student, steps"
        done, note = last_step(job.run.metrics), ""
        if done == before < job.train.max_steps:
            note = "starting"
        if job.stage == "train":
            note = read_cursor(job.run)[1] or note
        session.bars.show(title, done, job.train.max_steps, note)


def check_disk(folder: Path) -> None:
    """Raises RunFailed when nothing can be written there: a training would only fail again."""
    try:
        write_atomic(folder / "probe", bytes(PROBE_BYTES))
    except OSError as error:
        raise RunFailed(
            f"training failed, and {folder} takes no files ({error.strerror}); the same command "
            "goes on once it does"
        ) from error


class TrainerGroup:
    """The trainer group, started again as long as it gets further."""

    def __init__(self, session: Session, job: TrainJob) -> None:
        self._session, self._job = session, job
        self._starts = self._failures = 0
        self._verified = steps_done(job.run)
        self._future = self._start()

    def poll(self) -> bool:
        """Whether training is done; starts the group again when it failed.

        Raises:
            ConfigError, CheckpointError, TrainingError: what a restart would only repeat.
            RunFailed: it failed too often without a new verified checkpoint.
        """
        if not self._future.done():
            return False
        error = self._future.exception()
        if error is None:
            return self._future.result() >= self._job.train.max_steps or self._is_stopped()
        self._restart(error)
        return False

    def wait(self, timeout_s: float) -> None:
        """Gives the ranks time to save after the stop file was made.

        Ranks that wait for a shard have nothing new to save, and see the file only with the shard.
        SIGTERM to the whole process group (timeout, systemd) ends Ray's daemons a little later, and
        no rank is heard of again.
        """
        start = time.monotonic()
        while not self._future.done() and time.monotonic() < start + timeout_s:
            if self._session.lost_daemon():
                return
            starves = self._job.stage == "train" and read_cursor(self._job.run)[1] != ""
            if starves and time.monotonic() > start + STARVED_GRACE_S:
                return
            time.sleep(POLL_PERIOD_S)

    def _is_stopped(self) -> bool:
        """A rank took a signal of its own (Slurm sends it to all) and saved."""
        self._session.stop_signal = self._session.stop_signal or signal.SIGTERM
        return False

    def _restart(self, error: BaseException) -> None:
        final = final_error(self._job)
        if final is not None:
            raise final
        if self._session.stop_signal:
            return
        check_disk(self._session.scratch)
        verified, said = steps_done(self._job.run), self._said(error)
        self._failures = 1 if verified > self._verified else self._failures + 1
        self._verified = max(verified, self._verified)
        limit = self._job.config.cluster.trainer.max_restarts
        if self._failures > limit:
            raise RunFailed(
                f"training failed {self._failures} times without a new verified checkpoint "
                f"(step {verified}); the last failure:\n{said}"
            )
        last_line = said.splitlines()[-1].split(". ")[0]
        append_line(self._job.run.events, {"kind": "restart", "step": verified, "error": last_line})
        self._session.bars.say(f"training failed and goes on from step {verified}: {last_line}")
        self._future = self._start()

    def _said(self, error: BaseException) -> str:
        """Why the group failed."""
        hangs = self._job.run.hangs
        if has_hung(hangs, self._since):
            timeout_s = self._job.config.cluster.trainer.step_timeout_s
            return f"no step for more than {timeout_s:g} s; {hangs} says where the ranks stood"
        return str(error).strip()

    def _start(self) -> Future[int]:
        """Runs `fit` in a thread that does not outlive the process."""
        future: Future[int] = Future()
        self._starts += 1
        self._since = time.time()
        name = f"{self._job.stage}-{self._starts}"

        def target() -> None:
            try:
                future.set_result(fit(self._job, name))
            except BaseException as error:  # handed to the main thread
                future.set_exception(error)

        threading.Thread(target=target, name=name, daemon=True).start()
        return future
