"""What a run has already got, from its files. Needs no torch, so a finished run is seen at once.

A start reads each of them once, into a `RunView`, and passes that down. The pool, the ranks and the
trainer group follow the files from there on.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from cluster.plan.stream import StreamPlan, stream_plan
from cluster.settings.schema import RunConfig
from cluster.state.evicted import oldest_verified, recorded
from cluster.state.identity import check_identity
from distill.checkpoint.manifest import latest_verified
from distill.config import ConfigError
from distill.data.stores.store import committed
from distill.run import files, identity, measured
from distill.teachers.config import TeacherConfig


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration as workers need it, whose working directory may be another."""

    def teacher(value: TeacherConfig) -> TeacherConfig:
        is_path = not value.may_be_name or Path(value.path).exists()
        return replace(value, path=_absolute(value.path)) if is_path else value

    location = config.trajectory.location
    location = location if "://" in location else _absolute(location)
    return replace(
        config,
        run=replace(config.run, dir=_absolute(config.run.dir)),
        trajectory=replace(config.trajectory, location=location),
        data=replace(
            config.data,
            path=_absolute(config.data.path),
            manifest=_absolute(config.data.manifest),
            autoencoder=_absolute(config.data.autoencoder),
        ),
        teacher={name: teacher(value) for name, value in config.teacher.items()},
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else path


def steps_done(run: files.RunDir) -> int:
    """Step of the newest verified checkpoint.

    Raises:
        CheckpointError: checkpoints exist and none verifies.
    """
    found = latest_verified(run.checkpoints)
    return found[0] if found else 0


@dataclass(frozen=True)
class RunView:
    """What the files of a run say at a start. Each is read when first asked for, and then never
    again: work that changes them asks for another view (`again`).

    Attributes:
        config: the settings of the start, with absolute paths.
        run: the files.
        record: run.json; None where nobody asks for it.
    """

    config: RunConfig
    run: files.RunDir
    record: identity.RunRecord | None

    def again(self) -> "RunView":
        """The files as they are now. run.json is as it was."""
        return replace(self)

    @cached_property
    def plan(self) -> StreamPlan:
        """What the steps of the run read, and in which order."""
        return stream_plan(self.config)

    @cached_property
    def shards(self) -> dict[int, int]:
        """Bytes of the tar of every shard that is there, by number."""
        return committed(self.run)

    @cached_property
    def recorded(self) -> set[int]:
        """The shards that evicted.json names. One that is there is not evicted all the same."""
        return recorded(self.run)

    @property
    def evicted(self) -> set[int]:
        """The shards that were made and deleted for room."""
        return self.recorded.difference(self.shards)

    @cached_property
    def step(self) -> int:
        """Step of the newest verified checkpoint; raises as `steps_done`."""
        return steps_done(self.run)

    @cached_property
    def oldest(self) -> int:
        """Step of the oldest verified checkpoint; 0 when there is none."""
        return oldest_verified(self.run.checkpoints)

    @property
    def is_trained(self) -> bool:
        """Whether the student has all its steps."""
        return self.step >= self.config.train.max_steps

    @property
    def has_all_shards(self) -> bool:
        """Whether every shard that the run's steps need was made: it is on disk, or evicted."""
        made = self.shards.keys() | self.evicted
        return sum(shard < self.plan.shards for shard in made) == self.plan.shards

    @property
    def is_distilled(self) -> bool:
        """Whether the student is trained and its shards are all there."""
        return self.is_trained and self.has_all_shards

    @property
    def has_results(self) -> bool:
        """Whether results.json is of the last checkpoint and of the evaluation asked for."""
        try:
            results = measured.read_results(self.run)
        except ConfigError:  # of another version
            return False
        asked = asdict(self.config.eval)
        return results is not None and (results.step, results.settings) == (self.step, asked)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do for `bowstring run`."""
        return self.run.report.exists() and self.has_results and self.is_distilled


def view_of(config: RunConfig, record: identity.RunRecord | None = None) -> RunView:
    """A view of a run whose run.json was read before, or is not asked for."""
    config = with_absolute_paths(config)
    return RunView(config, config.files, record)


def check_all(configs: list[RunConfig]) -> None:
    """Raises ConfigError when one of the runs is there with other settings."""
    for config in configs:
        check_identity(config, config.files)


def unfinished(configs: list[RunConfig]) -> list[RunConfig]:
    """The configurations whose runs are not finished; says of the others where the report is."""
    left = []
    for config in configs:
        if view_of(config).is_finished:
            print(f"nothing left to do; the report is at {config.files.report}")
        else:
            left.append(config)
    return left
