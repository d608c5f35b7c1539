"""The trainer group: started again as long as it gets further, with as many ranks as fit.

A rank that dies takes its group with it, since their collectives wait for it. The group goes on
from the last verified checkpoint, on what is left of the nodes. When nodes come back, its ranks
save, end, and start again with those of the new nodes: nothing is trained twice for that.
"""

import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from cluster.plan.placement import group_size, silent_nodes
from cluster.state.done import steps_done
from cluster.supervisor.session import Session
from cluster.trainer import fit, watchdog
from cluster.trainer.job import TrainJob
from distill.checkpoint.manifest import committed_steps
from distill.config import ConfigError
from distill.run import events, files, logs, measured

POLL_PERIOD_S = 0.1
FROZEN = "health check has been hanging"  # Ray Train's words
PROBE_BYTES = 2**16  # written before a training starts again
LOOK_PERIOD_S = 1.0  # between two looks at the nodes
SETTLE_S = 30.0  # the first group waits so long for the last of the nodes that start with it
GROW_AFTER_S = 60.0  # a group is so old before it makes way for a larger one
REJOIN_S = 900.0  # so long there may be too few nodes


class RunFailed(RuntimeError):
    """A stage ended for good. The message says why."""


def check_disk(folder: Path) -> None:
    """Raises RunFailed when nothing can be written there: a training would only fail again."""
    try:
        files.write_atomic(folder / "probe", bytes(PROBE_BYTES))
    except OSError as error:
        raise RunFailed(
            f"training failed, and {folder} takes no files ({error.strerror}); the same command "
            "goes on once it does"
        ) from error


def last_line(said: str) -> str:
    """The last line of an error, to its first full stop: Ray puts tracebacks before it."""
    return said.strip().splitlines()[-1].split(". ")[0]


class TrainerGroup:
    """The trainer group of one training.

    Attributes:
        job: what it trains.
        note: what it waits for, in words; "" when it does not wait.
    """

    def __init__(self, session: Session, job: TrainJob) -> None:
        self.job, self.note = job, ""
        self._session, self._trainer = session, job.config.cluster.trainer
        self._most = self._trainer.sizes(job.train)[-1]
        self._starts = self._failures = self._size = 0
        self._verified = steps_done(job.run)
        self._future: Future[int] | None = None
        self._why = ""  # why it failed after the run was told to stop
        self._ended_s, self._next_look_s, self._grows = time.monotonic(), 0.0, False

    def poll(self) -> bool:
        """Whether training is done; starts the group when it fits, and again when it failed.

        Raises:
            ConfigError, CheckpointError, TrainingError: what a restart would only repeat.
            RunFailed: it failed too often without a new verified checkpoint, or nodes stay away.
        """
        if self._future is None:
            if self._is_time_to_look():
                self._start_if_it_fits()
            return False
        if not self._future.done():
            if self._is_time_to_look():
                self._grow_if_more_fit()
            return False
        error = self._future.exception()
        if error is None and self._future.result() >= self.job.train.max_steps:
            return True
        grows = self._end()
        if error is not None:
            self._count_failure(error)
        elif not grows:
            # A rank took a signal of its own (Slurm sends it to all) and saved.
            self._session.stop_signal = self._session.stop_signal or signal.SIGTERM
        return False

    def wait(self, timeout_s: float) -> str:
        """Gives the ranks time to save after the stop file was made; why they lost steps, or "".

        SIGTERM to the whole process group (timeout, systemd) ends Ray's daemons a little later, and
        no rank is heard of again.

        Raises:
            ConfigError, CheckpointError, TrainingError: what the next start would only repeat.
        """
        why, deadline = self._why, time.monotonic() + timeout_s
        while self._future and not self._future.done() and not why:
            if lost := self._session.lost_daemon():
                why = f"Ray's {lost} ended before they had"
            elif time.monotonic() > deadline:
                why = f"they had not after {timeout_s:g} s"
            time.sleep(POLL_PERIOD_S)
        if self._future and self._future.done() and (error := self._future.exception()):
            why = last_line(self._said(error))
        if why and (final := fit.final_error(self.job)) is not None:
            raise final
        saved = max(committed_steps(self.job.run.checkpoints), default=0)
        return why if saved < measured.last_step(self.job.run.metrics) else ""

    # -- Its size

    def _is_time_to_look(self) -> bool:
        """Whether to ask Ray for its nodes again."""
        now = time.monotonic()
        due = now >= self._next_look_s
        if due:
            self._next_look_s = now + LOOK_PERIOD_S
        return due

    def _start_if_it_fits(self) -> None:
        """Starts the group, or notes what it waits for."""
        nodes, waited_s = self._session.nodes(), time.monotonic() - self._ended_s
        silent = silent_nodes(nodes)
        size = 0 if silent else group_size(self.job.config.cluster, self.job.train, nodes)
        if size == self._most or (size and (self._starts or waited_s > SETTLE_S)):
            self._start(size)
            return
        if not self.job.config.cluster.address and not silent and any(n["Alive"] for n in nodes):
            raise ConfigError(
                f"this machine has no room for cluster.trainer.num_workers="
                f"{self._trainer.min_workers} ranks beside cluster.teachers.num_workers="
                f"{self.job.config.cluster.teachers.num_workers}; ask for fewer, or for less of a "
                "GPU (gpus_per_worker)"
            )
        if not self.note:
            events.append(self.job.run, events.GroupWaits())
        self.note = "waits for nodes"
        if waited_s > REJOIN_S:
            lacks = f"; {', '.join(silent)} does not answer" if silent else ""
            raise RunFailed(
                f"for {REJOIN_S:g} s there was no room for {self._trainer.min_workers} trainer "
                f"ranks (cluster.trainer.num_workers){lacks}; the same command goes on once there "
                "is"
            )

    def _grow_if_more_fit(self) -> None:
        """Asks the ranks to save and end when a larger group would fit; the next one is that.

        Not before this one has logged a step, or nodes that come and go would stop all progress. It
        began at a checkpoint, so that step may be behind the last one of the group before.
        """
        if self._size == self._most or self._grows or time.monotonic() < self._grow_s:
            return
        nodes = self._session.nodes()
        size = group_size(self.job.config.cluster, self.job.train, nodes)
        if size > self._size and measured.last_step(self.job.run.metrics) != self._seen:
            if silent_nodes(nodes):
                return
            self._session.bars.say(f"nodes for {size} trainer ranks are there: saves, and goes on")
            self._grows = True
            self.job.stop.touch()

    # -- Start and end

    def _start(self, size: int) -> None:
        """Runs `fit` in a thread that does not outlive the process."""
        future: Future[int] = Future()
        self._starts += 1
        self._grow_s = time.monotonic() + GROW_AFTER_S
        self._stacks_bytes = watchdog.stacks_bytes(self.job.run.hangs)
        self._size, self._seen, self.note = size, measured.last_step(self.job.run.metrics), ""
        name = f"{self.job.stage}-{self._starts}"
        self.job.stop.unlink(missing_ok=True)  # a rank of the group before may have left it
        events.append(self.job.run, events.Group(size))
        if size < self._most:
            self._session.bars.say(f"trains on {size} ranks; there is no room for {self._most} now")

        def target() -> None:
            try:
                future.set_result(fit.fit(self.job, size, name))
            except BaseException as error:  # handed to the main thread
                future.set_exception(error)

        threading.Thread(target=target, name=name, daemon=True).start()
        self._future = future

    def _end(self) -> bool:
        """Forgets the group that has ended; whether it was asked to make way."""
        grows, self._grows, self._future = self._grows, False, None
        self._ended_s, self._next_look_s = time.monotonic(), 0.0
        return grows

    def _count_failure(self, error: BaseException) -> None:
        """Lets the group start again, unless that would not help."""
        final = fit.final_error(self.job)
        if final is not None:
            raise final
        if self._session.stop_signal:
            self._why = last_line(self._said(error))
            return
        check_disk(self._session.scratch)
        verified, said = steps_done(self.job.run), self._said(error)
        self._failures = 1 if verified > self._verified else self._failures + 1
        self._verified = max(verified, self._verified)
        if self._failures > self._trainer.max_restarts:
            raise RunFailed(
                f"training failed {self._failures} times without a new verified checkpoint "
                f"(step {verified}); the last failure:\n{said}{logs.words(self.job.config.files)}"
            )
        short = last_line(said)
        events.append(self.job.run, events.Restart(verified, short))
        self._session.bars.say(f"training failed and goes on from step {verified}: {short}")

    def _said(self, error: BaseException) -> str:
        """Why the group failed."""
        hangs, timeout_s = self.job.run.hangs, self._trainer.step_timeout_s
        if watchdog.stacks_bytes(hangs) > self._stacks_bytes:
            return f"no step for more than {timeout_s:g} s; {hangs} says where the ranks stood"
        if FROZEN in str(error):
            return f"a rank answered nothing for more than {timeout_s:g} s, as if frozen"
        return str(error).strip() or type(error).__name__
