"""The batch scripts of a run: slurm/*.sbatch with the settings of the site. Pure; no torch, no ray.

A script as it is installed says what holds everywhere. Rendering adds two groups of lines: options
of sbatch behind those that are there, and exports and set-up lines in place of the line `#@`.
"""

import hashlib
import re
import shlex
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cluster.plan import nodes
from cluster.settings.schema import RunConfig, SlurmConfig
from cluster.slurm.jobs import kind_of
from distill.config import check

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
    for kind in slurm.kinds:
        job = slurm.job(kind)
        check(
            TIME.fullmatch(job.time) is not None,
            f"{slurm.key(kind)}.time={job.time} is no time such as 90:00, 2:30:00 or 1-00:00:00"
            "; in YAML and on the command line it needs quotes, '2:30:00', or it is a number",
        )
    limit_s = nodes.seconds(slurm.train.time)
    check(
        limit_s is None or slurm.save_s < limit_s,
        f"cluster.slurm.save_s={slurm.save_s} begins before a job of cluster.slurm.train.time="
        f"{slurm.train.time} has started; give it more time, or less to save",
    )
    return slurm


def job_name(config: RunConfig, root: Path) -> str:
    """Name of the jobs of a run, told from those of a run of that name in another folder."""
    name = re.sub(r"[^\w.=-]", "_", config.run.name)
    return f"bow-{name}-{hashlib.sha256(str(root).encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Plan:
    """What the jobs of a run take, by kind.

    Attributes:
        shapes: of their nodes.
        shares: of these nodes.
        chain: jobs of the trainer, one after the other; each of a chain is queued once only.
    """

    config: RunConfig
    slurm: SlurmConfig
    shapes: dict[str, nodes.Shape]
    shares: dict[str, nodes.Share]
    chain: int = 1


def plan(config: RunConfig, shapes: dict[str, nodes.Shape], chain: int = 1) -> Plan:
    """What the jobs of a run take. A kind without a shape has a node of which nothing is known.

    Raises:
        ConfigError: the settings cannot work, on these nodes or on any.
    """
    slurm = slurm_of(config)
    shapes = {kind: shapes.get(kind, nodes.Shape()) for kind in slurm.kinds}
    shares = {kind: nodes.share(config, kind, shapes[kind]) for kind in slurm.kinds}
    for kind, found in shares.items():
        nodes.check_memory(config, kind, slurm.job(kind), found, shapes[kind])
    return Plan(config, slurm, shapes, shares, chain)


def render(made: Plan, root: Path) -> dict[str, str]:
    """The scripts of a run in `root`, an absolute path, by kind of job."""
    check(
        re.search(r'["\\%\n]', str(root)) is None,
        f"run.dir={root} cannot stand in a batch script: sbatch reads quotes, backslashes, percent "
        "signs and line breaks in its own way; choose another place with run.dir=...",
    )
    return {kind: _render(made, kind, root) for kind in made.shares}


def _render(made: Plan, kind: str, root: Path) -> str:
    text = files("bowstring_slurm").joinpath(f"{kind_of(kind)}.sbatch").read_text()
    lines = text.splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    mark = next(n for n, line in enumerate(lines) if line.startswith(SETTINGS_MARK))
    options = [f"#SBATCH {option}" for option in sbatch_options(made, kind, root)]
    settings = [f"export {k}={shlex.quote(v)}" for k, v in variables(made, kind, root).items()]
    return "\n".join(
        [
            *lines[: last + 1],
            *options,
            *lines[last + 1 : mark],
            *settings,
            *set_up(made.slurm.setup),
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


def sbatch_options(made: Plan, kind: str, root: Path) -> list[str]:
    """Options of sbatch of one kind of job."""
    job, found = made.slurm.job(kind), made.shares[kind]
    is_array = kind_of(kind) == "teachers"
    log = f"{kind}-%A_%a.log" if is_array else f"{kind}-%j.log"
    options = [
        f"--job-name={job_name(made.config, root)}-{kind}",
        f'--output="{root}/slurm/logs/{log}"',
        f"--cpus-per-task={found.cpus}",
    ]
    if found.gpus:  # where Slurm knows no GPUs, nothing else keeps another job from them
        options.append(made.slurm.gpus_by(kind).replace("{gpus}", str(found.gpus)) or "--exclusive")
    options += job.named_options()
    if not job.time:
        limit_s = nodes.time_limit_s(made.config, kind, made.shapes[kind])
        options.append(f"--time={nodes.limit_words(limit_s)}")
    own, others = split_dependency(job.options)
    if kind == "train":
        least = -(-made.config.cluster.trainer.min_workers // found.per_node)
        # As many as are free. With --ntasks-per-node Slurm would take the least instead.
        count = f"{least}-{found.nodes}" if least < found.nodes else f"{found.nodes}"
        options += [f"--nodes={count}", f"--signal=B:USR1@{made.slurm.save_s}"]
        if made.chain > 1:
            options.append("--no-requeue")
        own = joined("singleton", own, kind)  # one at a time, however often it is submitted
    if is_array:  # what may not be queued again needs others to come after it
        options.append(f"--array=0-{found.most_nodes * made.chain - 1}%{found.nodes}")
    return options + ([f"--dependency={own}"] if own else []) + others


def split_dependency(options: list[str]) -> tuple[str, list[str]]:
    """The dependency among options of sbatch, "" for none, and the other options."""
    found, others = "", []
    for option in options:
        if match := re.fullmatch(r"(?:--dependency=|--dependency |-d ?)(\S+)", option):
            found = match[1]
        else:
            others.append(option)
    return found, others


def excluded(options: list[str]) -> list[str]:
    """The nodes that options of sbatch leave out, as they stand there."""
    found = [re.fullmatch(r"(?:--exclude=|--exclude |-x ?)(\S+)", option) for option in options]
    return [match[1] for match in found if match]


def joined(ours: str, own: str, kind: str) -> str:
    """A dependency on both. Raises ConfigError where Slurm has no words for that."""
    check(
        not own or not ({*"?"} & {*(ours + own)}),
        f"options of the {kind} job: --dependency={own} cannot be joined with the run's own, "
        f"{ours}; Slurm takes commas (all of them) or question marks (any), not both",
    )
    return f"{ours},{own}" if own else ours


def container_words(slurm: SlurmConfig, root: Path) -> str:
    """Options of srun for the container that commands run in; "" for none."""
    box = slurm.container
    check(
        not box.image or re.search(r"[\s,:$]", str(root)) is None,
        f"run.dir={root} cannot be mounted into a container, with a space, comma, colon "
        "or $ in it; choose another folder, or no cluster.slurm.container.image",
    )
    own = [f"{path}:{path}" for path in (str(root), slurm.scratch)]
    mounts = ",".join(dict.fromkeys([*own, *box.mounts]))
    return f"--container-image={box.image} --container-mounts={mounts}" if box.image else ""


def variables(made: Plan, kind: str, root: Path) -> dict[str, str]:
    """What a script takes from its environment."""
    slurm, share = made.slurm, made.shares[kind]
    found = {"BOWSTRING_LAUNCH": slurm.launch, "BOWSTRING_CONTAINER": container_words(slurm, root)}
    if kind != "evaluate":
        found["BOWSTRING_OBJECT_STORE_BYTES"] = str(made.config.cluster.object_store_bytes)
        found["BOWSTRING_PATIENCE_S"] = str(slurm.patience_s)
        found["BOWSTRING_SCRATCH"] = slurm.scratch
        is_blind = share.gpus and not slurm.gpus_by(kind)
        found["BOWSTRING_GPUS"] = str(share.gpus) if is_blind else ""
        found["BOWSTRING_INTERFACE"] = slurm.interface
    if kind == "train":
        found["BOWSTRING_RANKS"] = str(share.per_node)
        found["BOWSTRING_CHAIN"] = str(made.chain) if made.chain > 1 else ""
    if kind_of(kind) == "teachers":
        found["BOWSTRING_WORKERS"] = str(share.per_node)
    return {name: value for name, value in found.items() if value}


def of_teachers(text: str) -> tuple[int, int]:
    """Workers per node, and nodes at most, of a script of teachers as it was submitted."""
    workers = re.search(r"^export BOWSTRING_WORKERS=(\d+)$", text, re.MULTILINE)
    array = re.search(r"^#SBATCH --array=0-(\d+)%\d+$", text, re.MULTILINE)
    check(
        workers is not None and array is not None,
        "the teachers' script in slurm/ is not as `bowstring submit` wrote it; submit again",
    )
    assert workers is not None and array is not None
    return int(workers[1]), int(array[1]) + 1
