"""What a run will make and cost, from its settings alone. Needs no torch.

Samples are read B per step, each block of `block_shards` shards `passes` times, so N steps need

    blocks = ceil( N B / (block_shards samples_per_shard passes) ),  shards = blocks * block_shards.

Where passes are spread over W blocks, the last step leaves some unread: up to (W - 1) / 2 blocks
more (`distill.data.order`). Counts and bytes are exact. FLOP follow from the network's formula
(`distill.networks.cost`). Hours divide them by an assumed speed and leave out waiting, restarts and
input; they are no more than that.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from rich import console, table

from cluster.plan import memory, stream
from cluster.settings.schema import RunConfig, own_teachers
from distill.config import check
from distill.evaluation.curves import grid_columns, grid_rows, teacher_curves, truth
from distill.flow.times import NFE_PER_STEP
from distill.networks.cost import NetworkCost, network_cost
from distill.teachers.config import TeacherConfig

# -----------------------------------------------------------------------------------------------
# Counts and bytes


def teacher_forwards(teacher: TeacherConfig, with_velocity: bool = False) -> int:
    """Network forwards of one trajectory; the velocity at its end is one more evaluation."""
    evaluations = teacher.steps * NFE_PER_STEP[teacher.solver] + with_velocity
    return evaluations * forwards_per_evaluation(teacher)


def forwards_per_evaluation(teacher: TeacherConfig) -> int:
    """Network forwards of one evaluation of the velocity: guidance needs two."""
    return 1 if teacher.guidance == 1 else 2


def evaluation_forwards(config: RunConfig) -> int:
    """Network forwards of `distill.evaluation.evaluate`: student, fine solution, teacher's
    rows, pictures.
    """
    evaluation, image = config.eval, config.data.image
    best = list(config.teacher.values())[-1]
    drawn = [
        nfe
        for solver, nfe in teacher_curves(best, evaluation)
        if (solver, nfe) != truth(best, evaluation)
    ]
    of_teacher = forwards_per_evaluation(best) * (truth(best, evaluation)[1] + sum(drawn))
    forwards = evaluation.num_samples * (sum(evaluation.nfe) + of_teacher)
    if image.is_picture:
        forwards += grid_columns(evaluation.num_samples, image) * sum(
            nfe * (forwards_per_evaluation(best) if who == "teacher" else 1)
            for who, _, nfe in grid_rows(best)
        )
    return forwards


# -----------------------------------------------------------------------------------------------
# The estimate


@dataclass(frozen=True)
class Stage:
    """Work of one stage: network forwards, FLOP, and what they come to at the assumed speed."""

    forwards: int
    flops: float
    workers: int
    device_hours: float
    hours: float


def _stage(forwards: int, work: float, network: NetworkCost, workers: int, speed: float) -> Stage:
    """A stage of `forwards` forwards that cost as much as `work` plain ones."""
    flops = work * network.flops
    device_hours = flops / speed / 3600
    return Stage(forwards, flops, workers, device_hours, device_hours / workers)


def stages(config: RunConfig, speed: float) -> dict[str, Stage]:
    """The stages of a run. Foreign teachers are taken to be as large as the student."""
    network = network_cost(config.student, config.data.image)
    plan = stream.stream_plan(config)
    teachers, ranks = config.cluster.teachers.num_workers, config.cluster.trainer.max_workers
    found = {}
    if own_teachers(config):
        seen = config.pretrain.train.max_steps * config.pretrain.train.batch_size
        found["pretrain"] = _stage(seen, 3 * seen, network, ranks, speed)
    forwards = plan.samples * sum(
        teacher_forwards(teacher, config.trajectory.store_velocity)
        for teacher in config.teacher.values()
    )
    found["generate"] = _stage(forwards, forwards, network, teachers, speed)
    calls = config.objective.calls()
    seen = config.train.max_steps * config.train.batch_size
    forwards, work = round(seen * calls.forwards), seen * calls.in_forwards
    found["train"] = _stage(forwards, work, network, ranks, speed)
    forwards = evaluation_forwards(config)
    found["evaluate"] = _stage(forwards, forwards, network, 1, speed)
    return found


def estimate(config: RunConfig, speed: float | None = None) -> dict[str, Any]:
    """Everything `bowstring estimate` says, ready for JSON. `speed` in FLOP/s; None takes
    cluster.device_flops.
    """
    speed = speed or config.cluster.device_flops
    check(speed > 0, f"--flops={speed} must be above 0")
    network = network_cost(config.student, config.data.image)
    work = stages(config, speed)
    device_hours = sum(stage.device_hours for stage in work.values())
    price = config.cluster.device_cost_per_hour
    planned = asdict(stream.stream_plan(config))
    del planned["order"]  # no figure
    ranks = config.cluster.trainer.min_workers  # fewer hold more each
    on_device, on_host = memory.state_bytes(network.parameters, config.train, ranks)
    return {
        "run": config.run.name,
        "exact": {
            "train_steps": config.train.max_steps,
            "samples_read": config.train.max_steps * config.train.batch_size,
            **planned,
            "max_bytes_on_disk": min(planned["num_bytes"], config.trajectory.max_bytes),
            "parameters": network.parameters,
            "forwards": {name: stage.forwards for name, stage in work.items()},
        },
        "formula": {
            "state_bytes_per_rank": on_device,
            "offloaded_bytes_per_rank": on_host,
            "flops_per_forward": network.flops,
            "flops": {name: stage.flops for name, stage in work.items()},
        },
        "assumed": {
            "device_flops_per_s": speed,
            "device_hours": {name: stage.device_hours for name, stage in work.items()},
            "hours": {name: stage.hours for name, stage in work.items()},
            "total_device_hours": device_hours,
            "cost_per_device_hour": price or None,
            "cost": device_hours * price if price else None,
        },
    }


def show(config: RunConfig, speed: float | None, as_json: bool) -> None:
    """Prints the estimate of a configuration."""
    found = estimate(config, speed)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    screen = console.Console()
    exact, assumed = found["exact"], found["assumed"]
    screen.print(f"[bold]{found['run']}[/bold]")
    counts = table.Table(title="exact, from the settings", title_justify="left", show_header=False)
    for label, value in (
        ("pairs (noise, trajectory)", f"{exact['samples']:,}"),
        ("shards", f"{exact['shards']:,} in {exact['blocks']:,} blocks"),
        ("bytes per pair", f"{exact['sample_bytes']:,}"),
        ("bytes of all tars", f"{exact['num_bytes']:,}"),
        ("bytes of tars on disk at once, at most", f"{exact['max_bytes_on_disk']:,}"),
        (
            "samples read by training",
            f"{exact['samples_read']:,} in {exact['train_steps']:,} steps",
        ),
        ("parameters of the student", f"{exact['parameters']:,}"),
        (
            "bytes of a trainer rank at rest (formula)",
            f"{found['formula']['state_bytes_per_rank']:,}",
        ),
        (
            "... and in host memory, offloaded (formula)",
            f"{found['formula']['offloaded_bytes_per_rank']:,}",
        ),
        ("FLOP of one forward (formula)", f"{found['formula']['flops_per_forward']:,}"),
    ):
        if value != "0":
            counts.add_row(label, value)
    screen.print(counts)
    work = table.Table(
        title=f"at an assumed {assumed['device_flops_per_s']:.3g} FLOP/s per device",
        title_justify="left",
    )
    for column in ("stage", "forwards", "FLOP", "device-hours", "hours"):
        work.add_column(column, justify="left" if column == "stage" else "right")
    for name, forwards in exact["forwards"].items():
        flops, device, wall = (found["formula"]["flops"], assumed["device_hours"], assumed["hours"])
        work.add_row(
            name, f"{forwards:,}", f"{flops[name]:.3g}", f"{device[name]:.3g}", f"{wall[name]:.3g}"
        )
    work.add_row("total", "", "", f"{assumed['total_device_hours']:.3g}", "")
    screen.print(work)
    if assumed["cost"] is not None:
        screen.print(
            f"cost: {assumed['cost']:.2f} at {assumed['cost_per_device_hour']} per device-hour"
        )
    screen.print(
        "Waiting, restarts and input are not in the hours; generate and train run at the same time."
    )
