"""What a run has already got, from its files. Needs no torch, so a finished run is seen at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cluster.plan.stream import stream_plan
from cluster.settings.schema import RunConfig, is_own
from cluster.state.identity import check_identity
from cluster.state.room import read_evicted
from distill.checkpoint.manifest import latest_verified
from distill.config import ConfigError
from distill.data.stores.store import committed
from distill.run.dir import RunDir
from distill.run.results import read_results
from distill.teachers.config import TeacherConfig


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration as workers need it, whose working directory may be another."""

    def teacher(value: TeacherConfig) -> TeacherConfig:
        is_path = not value.may_be_name or Path(value.path).exists()
        return dataclasses.replace(value, path=_absolute(value.path)) if is_path else value

    location = config.trajectory.location
    location = location if "://" in location else _absolute(location)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=_absolute(config.run.dir)),
        trajectory=dataclasses.replace(config.trajectory, location=location),
        data=dataclasses.replace(config.data, path=_absolute(config.data.path)),
        teacher={name: teacher(value) for name, value in config.teacher.items()},
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else path


def own_teachers(config: RunConfig) -> dict[str, Path]:
    """Model folders of the teachers that this run pre-trains itself, by teacher name."""
    return {
        name: Path(teacher.path)
        for name, teacher in config.teacher.items()
        if teacher.is_from_run and is_own(teacher.path, config.run.dir)
    }


def steps_done(run: RunDir) -> int:
    """Step of the newest verified checkpoint.

    Raises:
        CheckpointError: checkpoints exist and none verifies.
    """
    found = latest_verified(run.checkpoints)
    return found[0] if found else 0


def has_all_shards(config: RunConfig, run: RunDir) -> bool:
    """Whether every shard that the run's steps need was made: it is on disk, or evicted."""
    planned, found = stream_plan(config).shards, committed(run)
    made = found.keys() | read_evicted(run, found)
    return sum(shard < planned for shard in made) == planned


def is_distilled(config: RunConfig, run: RunDir) -> bool:
    """Whether the student is trained and its shards are all there."""
    return steps_done(run) >= config.train.max_steps and has_all_shards(config, run)


def results_are_current(config: RunConfig, run: RunDir) -> bool:
    """Whether results.json is of the last checkpoint and of the evaluation asked for."""
    try:
        results = read_results(run)
    except ConfigError:  # of another version
        return False
    asked = dataclasses.asdict(config.eval)
    return results is not None and (results.step, results.settings) == (steps_done(run), asked)


def is_finished(config: RunConfig) -> bool:
    """Whether nothing is left to do for `bowstring run`."""
    config = with_absolute_paths(config)
    run = config.files
    has_report = run.report.exists()
    return has_report and is_distilled(config, run) and results_are_current(config, run)


def check_all(configs: list[RunConfig]) -> None:
    """Raises ConfigError when one of the runs is there with other settings."""
    for config in configs:
        check_identity(config, config.files)


def unfinished(configs: list[RunConfig]) -> list[RunConfig]:
    """The configurations whose runs are not finished; says of the others where the report is."""
    left = []
    for config in configs:
        if is_finished(config):
            print(f"nothing left to do; the report is at {config.files.report}")
        else:
            left.append(config)
    return left
