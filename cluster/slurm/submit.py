"""`bowstring submit`, `scale` and `stop`: the jobs of a run on a Slurm cluster. No torch, no ray.

slurm/{train,teachers,evaluate}.sbatch   the scripts as they were submitted
slurm/stop                               `bowstring stop` was here: a job that is told to save
                                         does not queue itself again
"""

import math
from pathlib import Path

from cluster.plan.estimate import estimate
from cluster.settings import file, schema
from cluster.slurm import jobs, scripts
from cluster.state import done, identity, lock, workers
from distill.config import ConfigError, check
from distill.run import events, files

# -----------------------------------------------------------------------------------------------
# Submit


def submit(config: schema.RunConfig, dry_run: bool) -> None:
    """Submits what a run still needs and says what; with `dry_run` prints the scripts instead.

    Raises:
        ConfigError: the settings cannot work, or the run is there with others.
        SlurmError: Slurm refused; nothing of it is left in the queue.
    """
    run = files.RunDir(config.files.root.absolute(), config.trajectory.location)
    view = done.view_of(config, identity.check_identity(config, run))
    texts = scripts.render(config, run.root)
    if dry_run:
        for kind, text in texts.items():
            print(f"# ---- {run.slurm / f'{kind}.sbatch'} {run.root}\n{text}")
        return
    if view.is_finished:
        print(f"nothing left to do; the report is at {run.report}")
        return
    jobs.ask("sbatch", "--version")  # refused here, before anything is written
    there = [job for job in jobs.read_jobs(run) if job.is_there]
    if any(job.kind == "train" for job in there) or (there and view.is_distilled):
        print(f"{run.root} is submitted already; nothing was changed:")
        for job in there:
            print(f"  {job.kind} {job.id}: {job.state} {job.reason}")
        return
    check(not lock.is_live(run), f"{run.root} is being worked on outside Slurm; wait for it")
    for array in {job.array for job in there}:  # without their trainer they have nothing to do
        jobs.ask("scancel", array)
    _show_plan(config)
    _write(config, run, texts)
    _submit_all(
        run, [kind for kind in scripts.KINDS if kind == "evaluate" or not view.is_distilled]
    )


def _show_plan(config: schema.RunConfig) -> None:
    slurm, figures = scripts.slurm_of(config), estimate(config)
    exact, assumed = figures["exact"], figures["assumed"]
    print(
        f"{config.run.name}: {exact['samples']:,} pairs in {exact['shards']:,} shards, "
        f"{exact['num_bytes']:,} bytes; {exact['train_steps']:,} steps; "
        f"{assumed['total_device_hours']:.3g} device-hours at an assumed "
        f"{assumed['device_flops_per_s']:.3g} FLOP/s (`bowstring estimate` says more)"
    )
    print(
        f"trainer: {slurm.train.nodes} nodes; teachers: {slurm.teachers.nodes} nodes at once, up "
        f"to {slurm.teachers.max_nodes} by `bowstring scale`, {slurm.teachers.workers_per_node} "
        "workers each"
    )


def _write(config: schema.RunConfig, run: files.RunDir, texts: dict[str, str]) -> None:
    """The scripts and the settings. Slurm asks for neither before everything is there."""
    try:
        (run.slurm / "logs").mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            files.write_atomic(_script(run, kind), text.encode())
        for left in ("stop", "head", "progress"):
            (run.slurm / left).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to run.dir={run.root} ({error.strerror}); choose another place with "
            "run.dir=..."
        ) from error
    file.save_config(run, config)


def _submit_all(run: files.RunDir, kinds: list[str]) -> None:
    for kind in kinds:  # partition, limits, account: refused before anything runs
        jobs.ask("sbatch", "--test-only", str(_script(run, kind)), str(run.root))
    ids: dict[str, str] = {}
    try:
        for kind in kinds:
            ids[kind] = jobs.submit(_script(run, kind), *_after(kind, ids), str(run.root))
            files.write_json(run.slurm / "jobs.json", ids)
            print(f"{kind}: job {ids[kind]}")
    except OSError:  # SlurmError too
        for job in ids.values():
            jobs.ask("scancel", job)
        raise


def _after(kind: str, ids: dict[str, str]) -> list[str]:
    """On what a job waits."""
    if "train" not in ids:
        return []
    if kind == "teachers":  # they would wait for a head
        return [f"--dependency=after:{ids['train']}"]
    return [f"--dependency=afterok:{ids['train']}", "--kill-on-invalid-dep=yes"]


def _script(run: files.RunDir, kind: str) -> Path:
    return run.slurm / f"{kind}.sbatch"


# -----------------------------------------------------------------------------------------------
# Scale and stop


def scale(run: files.RunDir, wanted: int) -> None:
    """Sets what the pool of a live run wants; of a run on Slurm also how many tasks of the array
    run.

    Raises:
        ConfigError: it is at rest, and has no jobs; or more than the array has.
    """
    if not jobs.read_ids(run):
        check(
            lock.is_live(run),
            f"{run.root} is not running; start it with cluster.teachers.num_workers={wanted}",
        )
        workers.write_target(run, wanted)
        return
    teachers = scripts.slurm_of(file.load_config(run)).teachers
    nodes = math.ceil(wanted / teachers.workers_per_node)
    check(wanted >= 0, f"{wanted} teacher workers cannot be; 0 pauses the production")
    check(
        nodes <= teachers.max_nodes,
        f"{wanted} teacher workers need {nodes} nodes, more than "
        f"cluster.slurm.teachers.max_nodes={teachers.max_nodes}; stop the run and submit it with "
        "more",
    )
    there = [job for job in jobs.read_jobs(run) if job.kind == "teachers" and job.is_there]
    check(bool(there), f"{run.root} has no teacher jobs; `bowstring submit` gives it some")
    if lock.is_live(run) and events.read_history(run).target is not None:
        workers.write_target(
            run, wanted
        )  # otherwise the pool that starts takes what fits on the nodes
    array = there[0].array
    running = sorted(int(job.id.partition("_")[2]) for job in there if job.state == "RUNNING")
    if nodes:
        jobs.ask("scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={nodes}")
        jobs.ask("scontrol", "release", array)
        for task in running[nodes:]:
            jobs.ask("scontrol", "requeue", f"{array}_{task}")
    else:  # a throttle of 0 would be none
        jobs.ask("scontrol", "hold", array)
        for task in running:
            jobs.ask("scontrol", "requeuehold", f"{array}_{task}")


def stop(run: files.RunDir) -> list[str]:
    """Ends the jobs of a run, or the one here; the trainer saves first. What was done, in words."""
    there = [job for job in jobs.read_jobs(run) if job.is_there]
    if not there:
        return [lock.stop_here(run)]
    (run.slurm / "stop").touch()
    said = []
    for kind in ("evaluate", "teachers"):
        for array in {job.array for job in there if job.kind == kind}:
            jobs.ask("scancel", array)
            said.append(f"{kind} {array}: cancelled")
    for job in [job for job in there if job.kind == "train"]:
        if job.state == "RUNNING":
            jobs.ask("scancel", "--batch", "--signal=TERM", job.id)
            said.append(f"train {job.id}: saves, then ends")
        else:
            jobs.ask("scancel", job.id)
            said.append(f"train {job.id}: cancelled")
    return said
