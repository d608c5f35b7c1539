"""Starts the ranks of a training through Ray Train; each runs `cluster.trainer.rank`.

The group can be started again at any time: a rank finds everything in the run directory and goes on
from the last verified checkpoint.
"""

import copy
import json
import os
import signal
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray.exceptions
import ray.train.torch
import torch
import torch.distributed as dist

from cluster.trainer import meeting
from cluster.trainer.job import TrainJob
from distill.checkpoint.manifest import CheckpointError
from distill.config import ConfigError
from distill.data.stream import StreamError
from distill.run import files, logs
from distill.training.loop import TrainingError

# A restart would only repeat these; a save that failed (SaveError) may succeed the next time.
FINAL = (ConfigError, CheckpointError, TrainingError, StreamError)

# Its other limits are -1, for ever: ranks that do not start, a node that is drained.
NEVER_AGAIN = ray.train.FailureConfig(
    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
)

RANK_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
stop_signal = threading.Event()


def fit(job: TrainJob, ranks: int, name: str) -> int:
    """Steps done by one group of `ranks` ranks from its start to its end; blocks.

    Ray neither starts the group again nor gives it another size: the supervisor counts restarts by
    verified checkpoints, and knows which sizes share the batch (`cluster.supervisor.group`).

    Raises:
        ray.train.TrainingFailedError: a rank raised, died or did not start.
    """
    workers = job.config.cluster.trainer
    on_gpu = workers.gpus_per_worker > 0
    resources = {"CPU": workers.cpus_per_worker, "trainer": 1.0}
    if on_gpu:
        resources["GPU"] = workers.gpus_per_worker
    trainer = ray.train.torch.TorchTrainer(
        train_rank,
        train_loop_config={"job": job},
        torch_config=RankConfig(backend="nccl" if on_gpu else "gloo", run=job.config.files),
        scaling_config=ray.train.ScalingConfig(
            num_workers=ranks, use_gpu=on_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name, storage_path=str(job.scratch), failure_config=NEVER_AGAIN
        ),
    )
    steps = trainer.fit().return_value
    assert isinstance(steps, int)
    return steps


def train_rank(arguments: dict[str, Any]) -> int:
    """Steps done when this rank stopped. Ray Train calls it in every rank."""
    # Here and not above: the supervisor imports this module and needs no DeepSpeed.
    from cluster.trainer.rank import run_rank

    job: TrainJob = arguments["job"]
    torch.set_num_threads(job.config.cluster.trainer.threads_per_worker)
    try:
        return run_rank(job, ray.train.torch.get_device(), lambda: is_told_to_stop(job))
    except FINAL as error:
        kind = next(kind.__name__ for kind in FINAL if isinstance(error, kind))
        files.write_json(job.final, {"kind": kind, "message": str(error)})
        raise


def is_told_to_stop(job: TrainJob) -> bool:
    """Whether this rank is to save and end.

    A signal that only this rank got is passed on to the others, which may be waiting for data.
    """
    if stop_signal.is_set():
        with suppress(OSError):  # the supervisor has ended, and its folder with it
            job.stop.touch()
        return True
    return os.path.exists(job.stop)  # a file server that is away says nothing


def final_error(job: TrainJob) -> Exception | None:
    """The error a rank left behind that a restart would only repeat."""
    try:
        found = files.patiently(lambda: json.loads(job.final.read_bytes()), ValueError)
    except FileNotFoundError:
        return None
    return {kind.__name__: kind for kind in FINAL}[found["kind"]](found["message"])


class RankBackend(ray.train.torch.config._TorchBackend):
    """Ray's process-group set-up, a log of each rank, and a flag for stop signals.

    Python takes signals in the main thread, and Ray Train runs its function in another one; this
    hook is called in the main thread of every rank.
    """

    def on_start(self, worker_group: Any, backend_config: "RankConfig") -> None:
        """Raises MeetingFailed when a rank does not answer, compute or reach the others."""
        run, each = backend_config.run, range(len(worker_group))
        assert run is not None

        def ask(rank: int, *call: Any) -> Future[Any]:
            return worker_group.execute_single_async(rank, *call).future()

        names = [f"rank {rank}" for rank in each]
        places = meeting.hear("answers", names, [ask(r, keep_words, run, r) for r in each])
        names = [f"rank {rank} on {place}" for rank, place in enumerate(places)]
        within = copy.copy(backend_config)
        within.timeout_s = int(meeting.MEETING_S)
        noted = _Noted(worker_group)
        try:
            super().on_start(noted, within)
        except ray.exceptions.RayError:  # of the first rank, which may only have waited for another
            meeting.hear("connects", names, [noted.answers[rank] for rank in each])
            raise
        if len(each) > 1:
            meeting.meet(ask, names, ray.train.torch.get_device)
            worker_group.execute(set_timeout, backend_config.timeout_s)
        worker_group.execute(catch_stop_signals)


class _Noted:
    """A group of workers, and the last answer of each."""

    def __init__(self, worker_group: Any) -> None:
        self._worker_group = worker_group
        self.answers: dict[int, Future[Any]] = {}

    def __len__(self) -> int:
        return len(self._worker_group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker_group, name)

    def execute_single_async(self, rank: int, *call: Any, **more: Any) -> Any:
        """As the group's own."""
        answer = self._worker_group.execute_single_async(rank, *call, **more)
        self.answers[rank] = answer.future()
        return answer


@dataclass
class RankConfig(ray.train.torch.TorchConfig):
    """Ray's settings of the process group, with the hook above."""

    run: files.RunDir | None = None  # Ray's own settings have defaults, so this one must

    @property
    def backend_cls(self) -> type[RankBackend]:
        return RankBackend


def keep_words(run: files.RunDir, rank: int) -> str:
    """Where this rank is, in words. From now on what it prints is kept in the run, and NCCL's
    warnings are among it.
    """
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    logs.keep(run, logs.rank_name(rank))
    return meeting.place(ray.util.get_node_ip_address())


def set_timeout(seconds: int) -> None:
    """Of the collectives of this rank, from now on."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def catch_stop_signals() -> None:
    """From now on a stop signal sets `stop_signal` in this process. For its main thread."""
    for number in RANK_STOP_SIGNALS:
        signal.signal(number, _note)
    os.register_at_fork(after_in_child=_leave_to_the_system)


def _note(*_: Any) -> None:
    stop_signal.set()


def _leave_to_the_system() -> None:
    """In a forked child: the flag there is a copy that nobody reads, and no signal would end it."""
    for number in RANK_STOP_SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)
