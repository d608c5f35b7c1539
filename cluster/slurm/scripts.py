"""The batch scripts of a run: slurm/*.sbatch with the settings of the site. Pure; no torch, no ray.

A script as it is installed says what holds everywhere. Rendering adds two groups of lines: options
of sbatch behind those that are there, and exports and set-up lines in place of the line `#@`.
"""

import hashlib
import math
import re
import shlex
from importlib.resources import files
from pathlib import Path

from cluster.settings.schema import JobConfig, RunConfig, SlurmConfig
from distill.config import check

KINDS = ("train", "teachers", "evaluate")
SETTINGS_MARK = "#@ "
TIME = re.compile(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}|")


def slurm_of(config: RunConfig) -> SlurmConfig:
    """The Slurm settings of a configuration. Raises ConfigError when they cannot work."""
    slurm, cluster = config.cluster.slurm, config.cluster
    check(
        slurm is not None,
        "these settings name no Slurm cluster; add cluster=slurm, or a file of your site as "
        "slurm/README.md shows",
    )
    assert slurm is not None
    check(
        cluster.address == "auto",
        f"cluster.address={cluster.address} is not the Ray cluster that the jobs start; "
        "set cluster.address=auto",
    )
    for kind in KINDS:
        job = job_of(slurm, kind)
        check(
            TIME.fullmatch(job.time) is not None,
            f"cluster.slurm.{kind}.time={job.time} is no time such as 90:00, 2:30:00 or 1-00:00:00"
            "; in YAML and on the command line it needs quotes, '2:30:00', or it is a number",
        )
    return slurm


def job_of(slurm: SlurmConfig, kind: str) -> JobConfig:
    """The settings of one kind of job."""
    return {"train": slurm.train, "teachers": slurm.teachers, "evaluate": slurm.evaluate}[kind]


def job_name(config: RunConfig, root: Path) -> str:
    """Name of the jobs of a run, told from those of a run of that name in another folder."""
    name = re.sub(r"[^\w.=-]", "_", config.run.name)
    return f"bow-{name}-{hashlib.sha256(str(root).encode()).hexdigest()[:6]}"


def render(config: RunConfig, root: Path) -> dict[str, str]:
    """The scripts of a run in `root`, an absolute path, by kind of job."""
    slurm = slurm_of(config)
    check(
        re.search(r'["\\%\n]', str(root)) is None,
        f"run.dir={root} cannot stand in a batch script: sbatch reads quotes, backslashes, percent "
        "signs and line breaks in its own way; choose another place with run.dir=...",
    )
    return {kind: _render(config, slurm, kind, root) for kind in KINDS}


def _render(config: RunConfig, slurm: SlurmConfig, kind: str, root: Path) -> str:
    text = files("bowstring_slurm").joinpath(f"{kind}.sbatch").read_text()
    lines = text.splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    mark = next(n for n, line in enumerate(lines) if line.startswith(SETTINGS_MARK))
    options = [f"#SBATCH {option}" for option in sbatch_options(config, slurm, kind, root)]
    settings = [
        f"export {k}={shlex.quote(v)}" for k, v in variables(config, slurm, kind, root).items()
    ]
    return "\n".join(
        [
            *lines[: last + 1],
            *options,
            *lines[last + 1 : mark],
            *settings,
            *set_up(slurm.setup),
            *lines[mark + 1 :],
            "",
        ]
    )


def set_up(lines: list[str]) -> list[str]:
    """A site's lines of bash. One that fails ends the job with its text, as with `set -e`; what
    fails inside a function or a file that it reads does not.
    """
    if not lines:
        return []
    failed = 'echo "error: a line of cluster.slurm.setup failed: $BASH_COMMAND"; exit 1'
    trap = f"[ ${{#BASH_SOURCE[@]}} -gt 1 ] || {{ {failed}; }}"
    return [f"trap {shlex.quote(trap)} ERR", *lines, "trap - ERR"]


def sbatch_options(config: RunConfig, slurm: SlurmConfig, kind: str, root: Path) -> list[str]:
    """Options of sbatch of one kind of job."""
    job = job_of(slurm, kind)
    cpus, gpus = node_resources(config, slurm, kind)
    log = f"{kind}-%A_%a.log" if kind == "teachers" else f"{kind}-%j.log"
    options = [
        f"--job-name={job_name(config, root)}-{kind}",
        f'--output="{root}/slurm/logs/{log}"',
        f"--cpus-per-task={cpus}",
    ]
    if gpus:
        options.append(slurm.gpu_option.replace("{gpus}", str(gpus)))
    options += job.named_options()
    if kind == "train":
        ranks = config.cluster.trainer
        least = math.ceil(ranks.min_workers / (ranks.max_workers // job.nodes))
        # As many as are free. With --ntasks-per-node Slurm would take the least instead.
        nodes = f"{least}-{job.nodes}" if least < job.nodes else f"{job.nodes}"
        options += [f"--nodes={nodes}", f"--signal=B:USR1@{slurm.save_s}"]
        options.append("--dependency=singleton")  # one at a time, however often it is submitted
    if kind == "teachers":
        options.append(f"--array=0-{slurm.teachers.max_nodes - 1}%{job.nodes}")
    return options + job.options


def node_resources(config: RunConfig, slurm: SlurmConfig, kind: str) -> tuple[int, int]:
    """Cores and GPUs of a node of one kind of job."""
    trainer, teachers = config.cluster.trainer, config.cluster.teachers
    if kind == "teachers":
        count = slurm.teachers.workers_per_node
        cores, gpus = count * teachers.cpus_per_worker, count * teachers.gpus_per_worker
    else:  # an evaluation is one process, on the device of a rank
        count = trainer.max_workers // slurm.train.nodes if kind == "train" else 1
        spare = 1 if kind == "train" else 0  # for the supervisor and the head
        cores, gpus = count * trainer.cpus_per_worker + spare, count * trainer.gpus_per_worker
    return max(1, math.ceil(cores)), math.ceil(gpus)


def container_words(slurm: SlurmConfig, root: Path) -> str:
    """Options of srun for the container that commands run in; "" for none."""
    box = slurm.container
    own = [f"{path}:{path}" for path in (str(root), slurm.scratch)]
    mounts = ",".join(dict.fromkeys([*own, *box.mounts]))
    return f"--container-image={box.image} --container-mounts={mounts}" if box.image else ""


def variables(config: RunConfig, slurm: SlurmConfig, kind: str, root: Path) -> dict[str, str]:
    """What a script takes from its environment."""
    found = {"BOWSTRING_LAUNCH": slurm.launch, "BOWSTRING_CONTAINER": container_words(slurm, root)}
    if kind != "evaluate":
        found["BOWSTRING_OBJECT_STORE_BYTES"] = str(config.cluster.object_store_bytes)
        found["BOWSTRING_PATIENCE_S"] = str(slurm.patience_s)
        found["BOWSTRING_SCRATCH"] = slurm.scratch
        found["BOWSTRING_INTERFACE"] = slurm.interface
    if kind == "train":
        found["BOWSTRING_RANKS"] = str(config.cluster.trainer.max_workers // slurm.train.nodes)
    if kind == "teachers":
        found["BOWSTRING_WORKERS"] = str(slurm.teachers.workers_per_node)
    return {name: value for name, value in found.items() if value}
