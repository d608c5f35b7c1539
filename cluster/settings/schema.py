"""Settings of the machine side, and the root of a run's configuration. No torch, no ray."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from distill.config import PretrainConfig, TrainConfig, check, check_positive, free
from distill.data.config import TrajectoryConfig
from distill.datasets.config import DataConfig
from distill.evaluation.config import EvalConfig
from distill.networks.config import NetworkConfig
from distill.objectives.config import ObjectiveConfig
from distill.run.files import RunDir
from distill.teachers.config import TeacherConfig, weight_table


@dataclass
class WorkersConfig:
    """A group of Ray workers: what each asks of the cluster."""

    cpus_per_worker: float = 1.0  # cores that Ray sets aside for one
    gpus_per_worker: float = 0.0  # GPUs of one; a part of one is shared
    threads_per_worker: int = 1  # intra-op threads of torch on a CPU worker

    def __post_init__(self) -> None:
        check_positive("cluster", threads_per_worker=self.threads_per_worker)


@dataclass
class TeacherPoolConfig(WorkersConfig):
    """The teacher pool. On a cluster it has as many workers as fit, at least `num_workers`."""

    num_workers: int = 2  # at least, at the start
    max_workers: int = 0  # and at most these; 0: as many as fit. Without a cluster not used
    lease_timeout_s: float = 120.0  # for one evaluation, a shard's upload, loading teachers
    # A shard that failed on so many nodes is given up, with its traceback; a GPU that failed so
    # often takes no more work.
    max_attempts: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("cluster.teachers", num_workers=self.num_workers)
        check(
            self.max_workers == 0 or self.max_workers >= self.num_workers,
            f"cluster.teachers.max_workers={self.max_workers} is less than "
            f"cluster.teachers.num_workers={self.num_workers}; 0 sets no limit",
        )


@dataclass
class TrainerConfig(WorkersConfig):
    """The trainer group."""

    # Ranks; or [min, max]: as many as the nodes take, and another number when they come and go.
    num_workers: Any = 2
    max_restarts: int = 3  # restarts without a new verified checkpoint before the run stops
    # A start, or a step with its save, that takes longer hangs: the group starts again. To wait for
    # data is no part of it.
    step_timeout_s: float = 1200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("cluster.trainer", step_timeout_s=self.step_timeout_s)
        given = self.num_workers if isinstance(self.num_workers, list) else [self.num_workers] * 2
        check(
            len(given) == 2 and all(type(n) is int for n in given) and 0 < given[0] <= given[1],
            f"cluster.trainer.num_workers={self.num_workers} must be a number above 0, or two, "
            "[min, max], with min at most max",
        )

    @property
    def min_workers(self) -> int:
        """Ranks at least."""
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def max_workers(self) -> int:
        """Ranks at most."""
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers

    def sizes(self, train: TrainConfig) -> list[int]:
        """Numbers of ranks that may train together, ascending.

        Raises:
            ConfigError: none of those asked for shares the batch.
        """
        asked = range(self.min_workers, self.max_workers + 1)
        found = [ranks for ranks in asked if train.is_shared_by(ranks)]
        if not found:
            train.accumulation(self.max_workers)  # says why, and what can be had
        return found


def _check_option(key: str, option: str) -> None:
    """Raises ConfigError for what would be another line of a batch script."""
    check(
        option.startswith("-") and "\n" not in option,
        f"{key}: '{option}' is no option of sbatch; write --name=value",
    )


def _check_variables(key: str, text: str) -> None:
    """Raises ConfigError for what a job does not expand: only $NAME and ${NAME} are."""
    bad = re.search(r"[$`]\S*", re.sub(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", "", text))
    check(
        bad is None,
        f"{key}: '{bad[0] if bad else ''}' is not expanded there; $NAME and ${{NAME}} are, and a "
        "line of cluster.slurm.setup may set NAME",
    )


def sbatch(name: str) -> Any:
    """A field whose value becomes the option `--name=value` of sbatch; "" leaves it to the site."""
    return field(default="", metadata={"sbatch": name})


@dataclass
class NodeConfig:
    """What a node has. What is not said here is read from Slurm (`cluster.slurm.site`)."""

    gpus: int | None = None  # of a node
    cpus: int | None = None  # cores as Slurm counts them, threads where it counts those
    memory: str = ""  # of the host, e.g. 500G

    def __post_init__(self) -> None:
        check(
            (self.gpus is None or self.gpus >= 0) and (self.cpus is None or self.cpus > 0),
            f"cluster.slurm.node: gpus={self.gpus} and cpus={self.cpus} are no node's",
        )
        check(
            re.fullmatch(r"(\d+[KMGT]?)?", self.memory) is not None,
            f"cluster.slurm.node.memory={self.memory} is no amount such as 500G",
        )


@dataclass
class JobConfig:
    """What the Slurm jobs of one kind ask for. Where it is empty, the site's default holds."""

    nodes: int = 0  # 0: as many as the ranks or workers need
    node: NodeConfig = field(default_factory=NodeConfig)  # where it differs from cluster.slurm.node
    partition: str = sbatch("partition")  # option of sbatch; "" is the site's default
    account: str = sbatch("account")  # option of sbatch
    qos: str = sbatch("qos")  # option of sbatch
    constraint: str = sbatch("constraint")  # option of sbatch
    # Limit: HH:MM:SS or D-HH:MM:SS, in quotes in a file. Empty: twice what `estimate` says.
    time: str = sbatch("time")
    memory: str = sbatch("mem")  # of a node, e.g. 60G
    memory_per_cpu: str = sbatch("mem-per-cpu")  # in its place, for sites that want it so
    options: list[str] = field(default_factory=list)  # of sbatch, e.g. --exclusive

    def __post_init__(self) -> None:
        check(self.nodes >= 0, f"cluster.slurm.*.nodes={self.nodes} must be at least 0")
        for name, (_, value) in self._named().items():
            check(
                re.search(r"[\s\"'\\#]", value) is None,
                f"cluster.slurm.*.{name}='{value}' must be one word without quotes",
            )
        for option in self.options:
            _check_option("cluster.slurm.*.options", option)

    def named_options(self) -> list[str]:
        """Options of sbatch that are set, "--name=value"."""
        return [f"--{option}={value}" for option, value in self._named().values() if value]

    def _named(self) -> dict[str, tuple[str, str]]:
        """Option of sbatch and value, by setting."""
        marked = [f for f in fields(self) if "sbatch" in f.metadata]
        return {f.name: (f.metadata["sbatch"], str(getattr(self, f.name))) for f in marked}


@dataclass
class TeacherJobConfig(JobConfig):
    """The job array of the teachers: one node per task. `nodes` run at once, and `bowstring scale`
    lets up to `max_nodes` run. What is 0 follows from the workers.
    """

    max_nodes: int = 0  # 0: for max_workers; where that is 0 too, twice as many as run at once
    workers_per_node: int = 0  # teacher workers of one task; 0: as many as its GPUs or cores take
    num_workers: int = 0  # of this array; 0: cluster.teachers.num_workers
    gpu_option: str | None = None  # of another kind of GPU; None: cluster.slurm.gpu_option

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu_option:
            _check_option("cluster.slurm.*.gpu_option", self.gpu_option)
        check(
            min(self.workers_per_node, self.max_nodes, self.num_workers) >= 0,
            f"cluster.slurm.teachers: workers_per_node={self.workers_per_node}, max_nodes="
            f"{self.max_nodes} and num_workers={self.num_workers} must be at least 0",
        )
        check(
            self.max_nodes == 0 or self.max_nodes >= self.nodes,
            f"cluster.slurm.teachers.max_nodes={self.max_nodes} is less than "
            f"cluster.slurm.teachers.nodes={self.nodes}",
        )


@dataclass
class ContainerConfig:
    """The image that commands run in, where Slurm has pyxis. $NAME is of the node's environment."""

    image: str = ""  # of srun --container-image: /images/x.sqsh, or registry#name:tag
    mounts: list[str] = field(default_factory=list)  # besides run.dir and scratch: /data:/data

    def __post_init__(self) -> None:
        for key, words in (("image", [self.image]), ("mounts", self.mounts)):
            for word in words:
                check(
                    re.search(r"[\s,\"'\\]", word) is None,
                    f"cluster.slurm.container.{key}: '{word}' must be one word without quotes or "
                    "commas",
                )
        check(
            not self.mounts or self.image != "",
            f"cluster.slurm.container.mounts={self.mounts} need cluster.slurm.container.image",
        )


@dataclass
class SlurmConfig:
    """The jobs of a run on a Slurm cluster, and what a site needs (`cluster.slurm`)."""

    train: JobConfig = field(default_factory=JobConfig)
    teachers: TeacherJobConfig = field(default_factory=TeacherJobConfig)
    # By name: teachers elsewhere at the same time, on another partition, account, kind of GPU.
    more_teachers: dict[str, TeacherJobConfig] = field(default_factory=dict)
    evaluate: JobConfig = field(default_factory=JobConfig)
    node: NodeConfig = field(default_factory=NodeConfig)  # of all jobs
    # Another site may want --gres=gpu:a100:{gpus}. "": its Slurm knows no GPUs, and jobs take whole
    # nodes of `node.gpus`.
    gpu_option: str = "--gpus-per-node={gpus}"
    setup: list[str] = field(default_factory=list)  # lines of bash: module load, an environment
    # Before every command, e.g. apptainer exec --nv IMAGE. $NAME is of the node's environment
    launch: str = ""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    scratch: str = "/tmp"  # on each node's own disk, for Ray's sockets; at most 20 characters
    interface: str = ""  # that nodes reach each other by: eth0, 10.1.0.0/16, 2001:db8::/32
    save_s: int = 300  # before the time limit the run saves and asks to be queued again
    patience_s: int = 900  # a wait for the other nodes, or for a head, longer than this fails

    def __post_init__(self) -> None:
        check_positive("cluster.slurm", save_s=self.save_s, patience_s=self.patience_s)
        if self.gpu_option:
            _check_option("cluster.slurm.gpu_option", self.gpu_option)
        check(
            re.fullmatch(r"[\w.:@/-]*", self.interface) is not None,
            f"cluster.slurm.interface={self.interface} is no name of an interface, nor a subnet "
            "such as 10.1.0.0/16",
        )
        for key, text in (("launch", self.launch), ("scratch", self.scratch)):
            _check_variables(f"cluster.slurm.{key}", text)
        box = self.container
        _check_variables("cluster.slurm.container", " ".join([box.image, *box.mounts]))
        check(
            self.scratch.startswith("$")
            or (self.scratch.startswith("/") and ("$" in self.scratch or len(self.scratch) <= 20)),
            f"cluster.slurm.scratch={self.scratch} must be an absolute path of at most 20 "
            "characters; the paths of Ray's sockets below it are limited",
        )

        for name in self.more_teachers:
            check(
                re.fullmatch(r"[A-Za-z][\w-]*", name) is not None,
                f"cluster.slurm.more_teachers.{name}: a name is a letter, and letters and digits",
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of jobs: train, teachers, teachers.NAME for each of `more_teachers`, evaluate."""
        more = (f"teachers.{name}" for name in self.more_teachers)
        return ("train", "teachers", *more, "evaluate")

    def job(self, kind: str) -> JobConfig:
        """The settings of one kind of job."""
        kinds = {"train": self.train, "teachers": self.teachers, "evaluate": self.evaluate}
        return kinds.get(kind) or self.array(kind)

    def array(self, kind: str) -> TeacherJobConfig:
        """The settings of one array of teachers."""
        return self.more_teachers[name] if (name := kind.partition(".")[2]) else self.teachers

    def gpus_by(self, kind: str) -> str:
        """Option of sbatch for the GPUs of one kind of job."""
        own = self.array(kind).gpu_option if kind.startswith("teachers") else None
        return self.gpu_option if own is None else own

    def key(self, kind: str) -> str:
        """Name of the settings of one kind of job."""
        return "cluster.slurm." + kind.replace("teachers.", "more_teachers.")


@dataclass
class ClusterConfig:
    """Where and how the run's processes are placed."""

    # "" starts Ray on this machine; otherwise the address of a running cluster, or "auto": the one
    # that RAY_ADDRESS names, as in a Slurm job.
    address: str = ""
    teachers: TeacherPoolConfig = field(default_factory=TeacherPoolConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    object_store_bytes: int = 200_000_000  # memory of Ray's object store on a node
    device_flops: float = 2e10  # FLOP/s that `estimate` assumes one worker's device to keep up
    # Its peak in the working precision, by its data sheet: `mfu` is a share of it. 0: not known.
    device_peak_flops: float = 0.0
    device_cost_per_hour: float = 0.0  # for `estimate`; 0 leaves the cost out
    slurm: SlurmConfig | None = None  # for `submit`

    def __post_init__(self) -> None:
        nodes = (self.slurm.train.nodes if self.slurm else 0) or 1
        check(
            self.trainer.max_workers % nodes == 0,
            f"cluster.trainer.num_workers={self.trainer.max_workers} must be a multiple of "
            f"cluster.slurm.train.nodes={nodes}; 0 nodes are as many as it needs",
        )

    @property
    def stop_grace_s(self) -> float:
        """How long a stop waits for the step at work and its save.

        A Slurm job must end before its time limit, or it is not queued again: a fifth of `save_s`
        is left for the end of Ray.
        """
        step_s = self.trainer.step_timeout_s
        return min(step_s, 0.8 * self.slurm.save_s) if self.slurm else step_s


@dataclass
class RunSection:
    """Name and place of a run."""

    name: str = MISSING  # of the run; that of the experiment unless said
    dir: str = MISSING  # folder; runs/NAME unless said
    command: str = ""  # the command line that made the run, for the report


@dataclass
class RunConfig:
    """Everything about a run. `experiment=NAME` fills it; the command line overrides any key."""

    run: RunSection = free(RunSection)
    seed: int = 0  # of noise, classes, order and first weights
    data: DataConfig = MISSING
    student: NetworkConfig = MISSING
    teacher: dict[str, TeacherConfig] = MISSING  # by name, weakest first
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    objective: ObjectiveConfig = MISSING
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    train: TrainConfig = MISSING
    eval: EvalConfig = free(MISSING)
    cluster: ClusterConfig = free(MISSING)

    @property
    def files(self) -> RunDir:
        """The run's files."""
        return RunDir(Path(self.run.dir), self.trajectory.location)

    def __post_init__(self) -> None:
        check(
            not self.trajectory.location.startswith("memory:"),
            f"trajectory.location={self.trajectory.location} lives in one process only, and a run "
            "has many; take a folder or an object store such as s3://BUCKET/FOLDER",
        )
        check(len(self.teacher) > 0, "teacher={} needs at least one teacher")
        for name, teacher in self.teacher.items():
            check(
                teacher.steps % self.trajectory.grid == 0,
                f"teacher.{name}.steps={teacher.steps} must be a multiple of "
                f"trajectory.grid={self.trajectory.grid}",
            )
            check(
                teacher.solver != "jumps" or not self.trajectory.store_velocity,
                f"trajectory.store_velocity=true with teacher.{name}.solver=jumps: a student that "
                "jumps has no velocity; set trajectory.store_velocity=false",
            )
            if teacher.precision == "auto":
                on_gpu = self.cluster.teachers.gpus_per_worker > 0 and teacher.kind != "analytic"
                teacher.precision = "bf16" if on_gpu else "fp32"
        weight_table(self.teacher, self.data.num_classes)
        trajectory = self.trajectory
        self.objective.check_run(self.train, trajectory.grid, trajectory.points)
        self.cluster.trainer.sizes(self.train)
        batch_size = self.train.batch_size
        blocks = trajectory.order(self.seed, batch_size).most_ahead(batch_size)
        check(
            trajectory.ready_ahead >= blocks * trajectory.block_shards,
            f"trajectory.ready_ahead={trajectory.ready_ahead} is too little for "
            f"train.batch_size={batch_size}: a batch may reach {blocks} blocks ahead, "
            f"{blocks * trajectory.block_shards} shards",
        )


def is_own(path: str, run_dir: str) -> bool:
    """Whether a teacher's path lies inside the run, that is, comes from its own pre-training."""
    return path.startswith(run_dir.rstrip("/") + "/")


def own_teachers(config: RunConfig) -> dict[str, Path]:
    """Model folders of the teachers that this run pre-trains itself, by teacher name."""
    return {
        name: Path(teacher.path)
        for name, teacher in config.teacher.items()
        if teacher.is_from_run and is_own(teacher.path, config.run.dir)
    }
