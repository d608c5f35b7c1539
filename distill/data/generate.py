"""One shard of teacher trajectories: ids -> noise and labels -> states on the grid.

The content is a pure function of seed, shard, teachers, solver, grid and guidance. The work is
split into batches of `trajectory.batch_size` ids from the shard's first one on, the same for every
worker, so that the same hardware gives the same bits. Where memory does not suffice for so many at
once, the batch is halved until it does: same ids, same noise, states equal up to rounding.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import ConfigError, ImageSpec, check
from distill.data.config import TrajectoryConfig
from distill.flow import paths, solvers
from distill.flow.curve import own_error
from distill.flow.noise import sample_labels, sample_noise
from distill.flow.times import sampler_times
from distill.flow.trajectory import GeneratedShard
from distill.teachers import base, build
from distill.teachers.config import TeacherConfig


def common_image(teachers: dict[str, base.FrozenTeacher]) -> ImageSpec:
    """The shape and classes that all teachers share.

    Raises:
        ConfigError: they differ, or there is none.
    """
    check(len(teachers) > 0, "teacher={} needs at least one teacher")
    (first, image), *rest = ((name, teacher.image) for name, teacher in teachers.items())
    for name, other in rest:
        check(
            other == image,
            f"teacher.{name} works on {other}, but teacher.{first} on {image}; teachers of one run "
            "share noise and labels, so they must agree",
        )
    return image


def generate_shard(
    teachers: dict[str, base.FrozenTeacher],
    configs: dict[str, TeacherConfig],
    trajectory: TrajectoryConfig,
    seed: int,
    shard: int,
    device: torch.device | str,
    beat: Callable[[], None] = lambda: None,
    batch_size: int | None = None,
) -> GeneratedShard:
    """The trajectories of ids shard n .. (shard + 1) n - 1 for n = `trajectory.samples_per_shard`.

    `teachers` and `configs` have the same names in the same order, weakest first. `beat` is
    called before every evaluation of a velocity: a place for heartbeats; what it raises ends the
    work. `batch_size` is what memory is known to suffice for, `trajectory.batch_size` if not given;
    a batch that does not fit is made again as two, down to single samples.

    Raises:
        ConfigError: teachers of different images, or steps that do not fit the grid.
        RuntimeError, MemoryError: memory does not suffice for a single sample.
    """
    assert list(teachers) == list(configs)
    image = common_image(teachers)
    count = trajectory.samples_per_shard
    ids = np.arange(shard * count, (shard + 1) * count, dtype=np.int64)
    labels = sample_labels(seed, ids, image.num_classes)
    fields = {name: build.build_field(teacher, configs[name]) for name, teacher in teachers.items()}
    states = torch.empty(count, len(teachers), len(trajectory.points), *image.shape)
    velocities = torch.empty_like(states) if trajectory.store_velocity else None

    def fill(part: slice) -> tuple[int, int]:
        """Evaluations and forwards that the states of some samples took."""
        nfe = forwards = 0
        noise = torch.from_numpy(sample_noise(seed, ids[part], image.shape)).to(device)
        label = torch.from_numpy(labels[part]).to(device)
        for index, (name, field) in enumerate(fields.items()):
            before = field.evaluations, field.forwards
            slopes: list[Tensor] | None = None if velocities is None else []
            path = integrate(field, noise, label, configs[name], trajectory.grid, beat, slopes)
            states[part, index] = path[trajectory.points].transpose(0, 1).float().cpu()
            if velocities is not None and slopes is not None:
                chosen = torch.stack([slopes[k] for k in trajectory.points], dim=1)
                velocities[part, index] = chosen.float().cpu()
            nfe += (field.evaluations - before[0]) * len(noise)
            forwards += (field.forwards - before[1]) * len(noise)
        return nfe, forwards

    first = nfe = forwards = 0
    batch_size = min(batch_size or trajectory.batch_size, count)
    while first < count:
        part = slice(first, min(first + batch_size, count))
        spent = unless_out_of_memory(fill, part, can_be_less=batch_size > 1)
        if spent is None:
            batch_size //= 2
        else:
            first, nfe, forwards = part.stop, nfe + spent[0], forwards + spent[1]
    for values in (states,) if velocities is None else (states, velocities):
        check_finite(values, ids, configs)
    return GeneratedShard(states, labels, ids, nfe, forwards, batch_size, velocities)


def curve_error(shard: GeneratedShard, times: tuple[float, ...]) -> float:
    """What the curve of the worst teacher is off by between the stored states, an estimate."""
    at = torch.tensor(times)
    given = [None] * shard.states.shape[1]
    velocities = given if shard.velocities is None else shard.velocities.unbind(dim=1)
    paths = zip(shard.states.unbind(dim=1), velocities, strict=True)
    return max(own_error(states, at, slopes) for states, slopes in paths)


def unless_out_of_memory(
    fill: Callable[[slice], tuple[int, int]], part: slice, can_be_less: bool
) -> tuple[int, int] | None:
    """`fill(part)`; None when memory does not suffice for so many samples.

    The caller goes on outside of the handler: there the error holds all that the batch took.

    Raises:
        RuntimeError, MemoryError: it does not suffice, and the part cannot be less.
    """
    try:
        return fill(part)
    except (MemoryError, RuntimeError) as error:
        if can_be_less and is_out_of_memory(error):
            return None
        raise


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether a device or this process has no memory left.

    On a GPU torch has a class for it; on a CPU it raises a plain RuntimeError. A batch may also be
    the first to need a handle of cuBLAS, which takes memory of its own.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "_ALLOC_FAILED"))


@torch.inference_mode()
def integrate(
    field: base.Guided,
    noise: Float[Tensor, "B *S"],
    label: Int[Tensor, "B"],
    config: TeacherConfig,
    grid: int,
    beat: Callable[[], None],
    velocities: list[Tensor] | None = None,
) -> Float[Tensor, "K1 B *S"]:
    """States of the teacher's ODE, or of its jumps, at t = 0, 1/K .. 1 from `noise`, K = `grid`.

    `velocities`, an empty list, gets those of the ODE at the same times; jumps have none.

    Raises:
        ConfigError: teacher.steps is not a multiple of the grid, or its jumps leave a time out.
    """
    substeps, rest = divmod(config.steps, grid)
    check(
        rest == 0,
        f"teacher.steps={config.steps} must be a multiple of trajectory.grid={grid}; "
        f"try {max(1, substeps) * grid}",
    )

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        beat()
        return field(x, t.expand(len(x)), label)

    times = torch.linspace(0, 1, grid + 1, dtype=torch.float64)
    if not isinstance(field, base.Jumps):
        return solvers.solve(velocity, noise, times, config.solver, substeps, velocities)
    assert velocities is None, "a student that jumps has no velocity"
    visited = torch.tensor(sampler_times(config.steps, field.middle), dtype=torch.float64)
    kept = visited[::substeps]
    check(
        bool((kept - times).abs().max() < 1e-9),
        f"teacher.steps={config.steps} jumps go through t = {visited.tolist()} and not through "
        f"every state of trajectory.grid={grid}; raise teacher.steps",
    )
    u = beating(field.mean_velocity, beat)
    return solvers.solve_by_jumps(u, noise, visited, label)[::substeps]


def beating(u: paths.MeanVelocity, beat: Callable[[], None]) -> paths.MeanVelocity:
    """`u`, with a call of `beat` before every evaluation."""

    def beaten(x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        beat()
        return u(x, t, s, label)

    return beaten


def check_finite(
    states: Float[Tensor, "N M K1 *S"], ids: np.ndarray, configs: dict[str, TeacherConfig]
) -> None:
    """Raises ConfigError naming the teachers and ids whose trajectory is not finite."""
    bad = ~states.flatten(3).isfinite().all(dim=-1).all(dim=-1)
    if bad.any():
        who = [name for name, column in zip(configs, bad.T, strict=True) if column.any()]
        coarse = [name for name in who if configs[name].precision == "bf16"]
        way = f", or bf16 is too coarse: try teacher.{coarse[0]}.precision=fp32" if coarse else ""
        where = ids[bad.any(dim=1).numpy()][:8].tolist()
        raise ConfigError(
            f"teacher {', '.join(who)} gives values that are not finite, first for sample ids "
            f"{where}; its weights or kind are wrong, or its solver takes too few steps{way}"
        )
