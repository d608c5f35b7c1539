"""`bowstring submit`, `scale` and `stop`: the jobs of a run on a Slurm cluster. No torch, no ray.

slurm/{train,teachers,evaluate}.sbatch   the scripts as they were submitted
slurm/stop                               `bowstring stop` was here: a job that is told to save
                                         does not queue itself again
"""

import re
from pathlib import Path

from cluster.plan import nodes
from cluster.plan.estimate import estimate
from cluster.settings import file, schema
from cluster.slurm import jobs, scripts, site
from cluster.state import done, identity, lock, workers
from distill.config import ConfigError, check
from distill.run import events, files

# -----------------------------------------------------------------------------------------------
# Submit


def submit(config: schema.RunConfig, dry_run: bool, chain: int = 1) -> None:
    """Submits what a run still needs and says what; with `dry_run` prints the scripts instead.

    `chain` jobs of the trainer follow one another, each where the one before stopped.

    Raises:
        ConfigError: the settings cannot work, on the nodes that there are, or the run is there with
            others.
        SlurmError: Slurm refused; nothing of it is left in the queue.
    """
    run = files.RunDir(config.files.root.absolute(), config.trajectory.location)
    view = done.view_of(config, identity.check_identity(config, run))
    check(chain > 0, f"--chain {chain} must be at least 1")
    scripts.slurm_of(config)  # said before Slurm is asked
    made = scripts.plan(config, _shapes(config, dry_run), chain)
    texts = scripts.render(made, run.root)
    if dry_run:
        for kind, text in texts.items():
            print(f"# ---- {run.slurm / f'{kind}.sbatch'} {run.root}\n{text}")
        return
    if view.is_finished:
        print(f"nothing left to do; the report is at {run.report}")
        return
    there = [job for job in jobs.read_jobs(run) if job.is_there]
    if any(job.kind == "train" for job in there) or (there and view.is_distilled):
        print(f"{run.root} is submitted already; nothing was changed:")
        for job in there:
            print(f"  {job.kind} {job.id}: {job.state} {job.reason}")
        return
    check(not lock.is_live(run), f"{run.root} is being worked on outside Slurm; wait for it")
    for array in {job.array for job in there}:  # without their trainer they have nothing to do
        jobs.ask("scancel", array)
    _show_plan(made)
    for words in site.grace_words(config, run):
        print(words)
    _write(config, run, texts)
    kinds = ["evaluate"] if view.is_distilled else ["train"] * (chain - 1) + [*texts]
    _submit_all(run, made, kinds)


def _shapes(config: schema.RunConfig, dry_run: bool) -> dict[str, nodes.Shape]:
    """Nodes of each kind of job; with `dry_run` by the settings alone, where no Slurm answers."""
    slurm, cluster = scripts.slurm_of(config), config.cluster
    try:
        found = site.read_nodes(patiently=not dry_run)
    except (ConfigError, jobs.SlurmError) as error:
        if not dry_run:
            raise
        print(f"# nodes as cluster.slurm.node says, for {str(error).splitlines()[0]}")
        found = []
    return {
        kind: site.shape_for(
            found,
            slurm,
            kind,
            (cluster.teachers if kind.startswith("teachers") else cluster.trainer).gpus_per_worker
            > 0,
        )
        for kind in slurm.kinds
    }


def _show_plan(made: scripts.Plan) -> None:
    config, figures = made.config, estimate(made.config)
    exact, assumed = figures["exact"], figures["assumed"]
    print(
        f"{config.run.name}: {exact['samples']:,} pairs in {exact['shards']:,} shards, "
        f"{exact['num_bytes']:,} bytes; {exact['train_steps']:,} steps; "
        f"{assumed['total_device_hours']:.3g} device-hours at an assumed "
        f"{assumed['device_flops_per_s']:.3g} FLOP/s (`bowstring estimate` says more)"
    )
    for kind, share in made.shares.items():
        if kind == "train":
            print(f"trainer: {share.nodes} nodes of {share.per_node} ranks, {_node(made, kind)}")
        elif kind != "evaluate":
            print(
                f"{kind}: {share.nodes} nodes of {share.per_node} workers at once, up to "
                f"{share.most_nodes} by `bowstring scale`, {_node(made, kind)}"
            )


def _node(made: scripts.Plan, kind: str) -> str:
    """What a kind takes of its nodes, in words."""
    share, shape = made.shares[kind], made.shapes[kind]
    return f"each {share.gpus} GPUs and {share.cpus} cores of {shape.where} with {shape.words()}"


def _write(config: schema.RunConfig, run: files.RunDir, texts: dict[str, str]) -> None:
    """The scripts and the settings. Slurm asks for neither before everything is there."""
    try:
        (run.slurm / "logs").mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            files.write_atomic(_script(run, kind), text.encode())
        for left in ("stop", "head", "progress", "made"):
            (run.slurm / left).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to run.dir={run.root} ({error.strerror}); choose another place with "
            "run.dir=..."
        ) from error
    file.save_config(run, config)


def _submit_all(run: files.RunDir, made: scripts.Plan, kinds: list[str]) -> None:
    """Submits a job for each kind; those of a chain are "train", "train.2", ... in jobs.json."""
    # Partition, limits, account: refused before anything runs.
    without = {kind: _without_sick(run, made, kind) for kind in dict.fromkeys(kinds)}
    ids: dict[str, str] = {}
    try:
        for kind in kinds:
            own, _ = scripts.split_dependency(made.slurm.job(kind).options)
            options = [*without[kind], *_after(kind, ids, own)]
            job = jobs.submit(_script(run, kind), *options, str(run.root))
            ids[kind if kind not in ids else f"{kind}.{len(ids) + 1}"] = job  # trainers come first
            files.write_json(run.slurm / "jobs.json", ids)
            print(f"{kind}: job {job}")
    except (OSError, ConfigError):  # SlurmError too
        for job in ids.values():
            jobs.ask("scancel", job)
        raise


def _without_sick(run: files.RunDir, made: scripts.Plan, kind: str) -> list[str]:
    """Options that leave out nodes where this run has failed, unless the others would not do.

    Raises:
        SlurmError: Slurm takes no such job at all.
    """
    test = ("sbatch", "--test-only")
    words = (str(_script(run, kind)), str(run.root))
    if sick := workers.sick_nodes(run):
        there = set(
            re.findall(r"^[\w.-]+$", jobs.ask("sinfo", "-h", "-N", "-o", "%N"), re.MULTILINE)
        )
        if left_out := sorted(there & sick.keys()):
            own = scripts.excluded(made.slurm.job(kind).options)
            option = "--exclude=" + ",".join([*own, *left_out])
            try:
                jobs.ask(*test, option, *words)
            except jobs.SlurmError:
                pass  # said of all nodes below
            else:
                for node in left_out:
                    print(f"{kind}: leaves out {node}, which failed: {sick[node]}")
                return [option]
    jobs.ask(*test, *words)
    return []


def _after(kind: str, ids: dict[str, str], own: str) -> list[str]:
    """On what a job waits, beside `own`, what its settings say; those of the trainer stand in its
    script.
    """
    trainers = [job for name, job in ids.items() if jobs.kind_of(name) == "train"]
    if kind == "train" or not trainers:
        return []
    if jobs.kind_of(kind) == "teachers":  # they would wait for a head
        return ["--dependency=" + scripts.joined(f"after:{trainers[0]}", own, kind)]
    finished = "?".join(f"afterok:{job}" for job in trainers)  # whichever of a chain it is
    return ["--dependency=" + scripts.joined(finished, own, kind), "--kill-on-invalid-dep=yes"]


def _script(run: files.RunDir, kind: str) -> Path:
    return run.slurm / f"{kind}.sbatch"


def _script_of(run: files.RunDir, kind: str) -> str:
    """The text of what a job was submitted with. Where jobs.json was lost, several jobs of one
    script have a number behind its name.
    """
    for name in (kind, kind.rpartition(".")[0]):
        if name and _script(run, name).is_file():
            return _script(run, name).read_text()
    raise ConfigError(f"{_script(run, kind)} is missing; submit the run again")


# -----------------------------------------------------------------------------------------------
# Scale and stop


def scale(run: files.RunDir, wanted: int) -> None:
    """Sets what the pool of a live run wants; of a run on Slurm also how many tasks of its arrays
    run: of the first as many as it has, then of the next.

    Raises:
        ConfigError: it is at rest, and has no jobs; or more than the arrays have.
    """
    ids = jobs.read_ids(run)
    if not ids:
        check(
            lock.is_live(run),
            f"{run.root} is not running; start it with cluster.teachers.num_workers={wanted}",
        )
        workers.write_target(run, wanted)
        return
    check(wanted >= 0, f"{wanted} teacher workers cannot be; 0 pauses the production")
    there = [job for job in jobs.read_jobs(run) if job.kind == "teachers" and job.is_there]
    check(bool(there), f"{run.root} has no teacher jobs; `bowstring submit` gives it some")
    kinds = [kind for kind, job in ids.items() if any(task.array == job for task in there)]
    sizes = {kind: scripts.of_teachers(_script_of(run, kind)) for kind in kinds}
    room = sum(per_node * most_nodes for per_node, most_nodes in sizes.values())
    check(
        wanted <= room,
        f"{wanted} teacher workers are more than the {room} of {' and '.join(kinds)} that the run "
        "was submitted with; stop it and submit it with more (cluster.slurm.teachers.max_nodes, or "
        "cluster.teachers.max_workers)",
    )
    if lock.is_live(run) and events.read_history(run).target is not None:
        workers.write_target(run, wanted)  # else the pool that starts takes what fits on its nodes
    for kind, (per_node, most_nodes) in sizes.items():
        count = min(most_nodes, -(-wanted // per_node))
        wanted = max(0, wanted - count * per_node)
        _throttle(run, ids[kind], [task for task in there if task.array == ids[kind]], count)


def _throttle(run: files.RunDir, array: str, tasks: list[jobs.Job], count: int) -> None:
    """Lets `count` tasks of an array run."""
    running = sorted(
        (job for job in tasks if job.state == "RUNNING"), key=lambda job: int(job.id.split("_")[1])
    )
    if count:
        jobs.ask("scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={count}")
        jobs.ask("scontrol", "release", array)
    else:  # a throttle of 0 would be none
        jobs.ask("scontrol", "hold", array)
    for task in running[count:]:
        try:
            jobs.ask("scontrol", "requeue" if count else "requeuehold", task.id)
        except jobs.SlurmError:  # heard before, perhaps, and not answered
            now = {job.id: job for job in jobs.read_jobs(run)}.get(task.id)
            if now and (now.state, now.restarts) == (task.state, task.restarts):
                raise


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
    trainers = [job for job in there if job.kind == "train"]
    # What waits first: of a chain the next would start.
    for job in sorted(trainers, key=lambda job: job.state == "RUNNING"):
        if job.state == "RUNNING":
            jobs.ask("scancel", "--batch", "--signal=TERM", job.id)
            said.append(f"train {job.id}: saves, then ends")
        else:
            jobs.ask("scancel", job.id)
            said.append(f"train {job.id}: cancelled")
    return said
