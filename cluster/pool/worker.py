"""A teacher worker: takes a shard number, samples the trajectories, commits the file.

It keeps nothing but how many samples fit into its memory at once, which it finds out by itself:
every worker tries `trajectory.batch_size` first, and halves its own when memory runs out.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cluster.plan.placement import Device
from cluster.pool import preflight
from cluster.settings.schema import RunConfig
from distill.data import generate, shards, sidecar
from distill.data.stores.store import committed
from distill.flow.trajectory import GeneratedShard
from distill.objectives.config import DrawnConfig
from distill.run import logs
from distill.run.files import RunDir
from distill.run.identity import read_record
from distill.run.records import tree_of
from distill.teachers import base, build, trial
from distill.training.memory import keep_freed_memory


class Dropped(Exception):
    """Another worker has made the shard."""


class TeacherWorker:
    """Makes shards. `cluster.pool.pool` runs each in a Ray actor.

    `produce` runs in one thread of the actor while `progress` answers in another, so a worker that
    hangs is told from one that is slow.
    """

    def __init__(
        self, config: RunConfig, run: RunDir, spec: sidecar.ShardSpec, device: Device
    ) -> None:
        self._config, self._run, self._spec, self._device = config, run, spec, device
        self._teachers: dict[str, base.FrozenTeacher] = {}
        self._evaluations = 0
        self._shard = self._dropped = -1
        trajectory = config.trajectory
        self._batch_size = min(trajectory.batch_size, trajectory.samples_per_shard)
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def introduce(self, birth: Callable[[], str]) -> preflight.Introduction:
        """Who this worker is and where it computes; `birth` says which node of Ray that is."""
        return preflight.introduction(self.name, self._device, birth())

    def load(self) -> dict[str, Any]:
        """Tries its place, loads the teachers, and tries those that run.json knows no trial of.

        Returns name, fingerprints and trials, by teacher.

        Raises:
            UnfitPlace: device, disk or the run's folder do not work here.
            ConfigError: a teacher is missing, or its own samples speak against it.
        """
        logs.keep(self._run, logs.worker_name(os.getpid()))
        preflight.preflight(self._run, self._device)
        keep_freed_memory()
        torch.set_num_threads(self._config.cluster.teachers.threads_per_worker)
        self._teachers = {
            name: build.build_teacher(teacher, self._device)
            for name, teacher in self._config.teacher.items()
        }
        prints = {name: teacher.fingerprint for name, teacher in self._teachers.items()}
        record = read_record(self._run)
        known = record.trials if record else {}
        untried = [name for name in self._teachers if name not in known]
        trials = {name: self._try(name) for name in untried}
        return {"worker": self.name, "fingerprints": prints, "trials": trials}

    def _try(self, name: str) -> dict[str, Any]:
        """The trial of a teacher. It is refused before the budget is spent, and not once it is."""
        config, teacher = self._config.teacher[name], self._teachers[name]
        if committed(self._run):
            config = replace(config, trial=False)
        found = trial.try_teacher(name, teacher, config, self._device, self._config.seed)
        return tree_of(found)

    def produce(self, shard: int) -> dict[str, Any] | None:
        """Makes and commits one shard; its size in bytes, and seconds. None if it was dropped.

        Also the batch from now on, if this shard was the one that did not fit into memory, and of
        the first shard the error of the curve, where the objective asks between the states.

        Raises:
            UnfitPlace: memory does not suffice for a single sample.
            ConfigError: a teacher gives values that are not finite.
        """
        started = time.monotonic()
        self._shard, self._dropped = shard, -1
        try:
            generated = self._generate(shard)
        except Dropped:
            return None
        except (MemoryError, RuntimeError) as error:
            if generate.is_out_of_memory(error):
                raise preflight.UnfitPlace(
                    f"its memory does not suffice for one sample at once ({error}); something else "
                    "holds it, or teachers of this size need a larger device"
                ) from error
            raise
        seconds = time.monotonic() - started
        standing = shards.write_shard(self._run, self._spec, shard, generated, seconds, self.name)
        result = {"bytes": standing.num_bytes, "seconds": round(seconds, 3)}
        if generated.batch_size < self._batch_size:
            self._batch_size = result["batch_size"] = generated.batch_size
        if shard == 0 and isinstance(self._config.objective, DrawnConfig):
            result["curve_error"] = generate.curve_error(generated, self._spec.times)
        return result

    def _generate(self, shard: int) -> GeneratedShard:
        return generate.generate_shard(
            self._teachers,
            self._config.teacher,
            self._config.trajectory,
            self._config.seed,
            shard,
            self._device,
            self._beat,
            self._batch_size,
        )

    def progress(self) -> tuple[str, int]:
        """Name, and evaluations of the teachers so far, which grow while a shard is made."""
        return self.name, self._evaluations

    def drop(self, shard: int) -> None:
        """Ends the work on a shard at its next evaluation."""
        self._dropped = shard

    def _beat(self) -> None:
        self._evaluations += 1
        if self._dropped == self._shard:
            raise Dropped
