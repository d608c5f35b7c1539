"""What `import bowstring` gives: the parts of `distill`, put together for one process."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from distill import sample
from distill.config import ConfigError, ImageSpec, TrainConfig, check
from distill.data.config import TrajectoryConfig
from distill.data.generate import common_image, generate_shard
from distill.data.order import Order
from distill.datasets.decode import to_uint8
from distill.engine.engine import TorchEngine
from distill.evaluation import curves, sampling
from distill.evaluation.config import EvalConfig
from distill.flow.noise import sample_noise
from distill.flow.times import EVEN, NFE_PER_STEP
from distill.flow.trajectory import GeneratedShard, TrajectoryBatch
from distill.networks import build, files as model_files, layers
from distill.networks.config import NETWORKS, NetworkConfig
from distill.objectives.base import Objective
from distill.objectives.build import build_objective
from distill.objectives.config import OBJECTIVES, ObjectiveConfig
from distill.run.files import RunDir
from distill.teachers import analytic, base, build as teachers
from distill.teachers.config import TEACHERS, TeacherConfig, weight_table
from distill.training import loop
from distill.training.callbacks import Callback

Device = str | torch.device | None
Settings = TypeVar("Settings")

# -----------------------------------------------------------------------------------------------
# Teachers


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and how its ODE is solved.

    Attributes:
        model: its velocity, in our convention: t = 0 noise, t = 1 data.
        config: solver, steps, guidance: the settings `teacher.NAME.*` of the command line.
        device: where it runs.
    """

    model: base.FrozenTeacher
    config: TeacherConfig
    device: torch.device

    @property
    def image(self) -> ImageSpec:
        """Shape and classes of its images."""
        return self.model.image

    def sample(
        self,
        num: int,
        nfe: int | None = None,
        seed: int = 0,
        labels: sample.Labels = None,
        solver: str | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Images [num, C, H, W] uint8 on the CPU, from the noise that a student of the same seed
        starts at; float32 of a latent space.

        `nfe` evaluations of the (guided) velocity by `solver`; without them as its settings say.

        Raises:
            ConfigError: num or a label out of range, or `nfe` is no whole number of solver steps.
        """
        check(num > 0, f"num={num} must be above 0")
        noise = torch.from_numpy(sample_noise(seed, np.arange(num), self.image.shape))
        chosen = sample.choose_labels(labels, self.image, seed, np.arange(num))
        x = self.solve(noise, chosen, nfe, solver, batch_size)
        return to_uint8(x) if self.image.is_picture else x

    def solve(
        self,
        noise: Tensor,
        labels: Tensor,
        nfe: int | None = None,
        solver: str | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """End points [B, C, H, W] float32, on the CPU, of the ODE from `noise`."""
        solver = solver or self.config.solver
        check(solver in NFE_PER_STEP, f"solver={solver} is none of: {', '.join(NFE_PER_STEP)}")
        per_step = NFE_PER_STEP[solver]
        nfe = self.config.steps * per_step if nfe is None else nfe
        check(
            nfe > 0 and nfe % per_step == 0,
            f"nfe={nfe} must be a multiple of {per_step}, the evaluations of a step of {solver}",
        )
        field = teachers.build_field(self.model, self.config)
        if isinstance(field, base.Jumps):
            draw = sampling.student_sampler(field.mean_velocity, nfe, field.middle)
        else:
            draw = sampling.teacher_sampler(field, solver, nfe)
        place = self.device
        pairs = zip(noise.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([draw(x.to(place), c.to(place)).float().cpu() for x, c in pairs])


def load_teacher(
    path: str | Path, kind: str = "", device: Device = None, **settings: Any
) -> Teacher:
    """The teacher at `path`, on a GPU when there is one.

    `path` is a run, for the teacher that it trained; a model folder; a folder of diffusers; a file
    of public weights; or a closed-form name, `ring8` or `mixture64`. `kind` says which where the
    files do not. `settings` are those of the command line's `teacher.NAME`: solver, steps ..

    Raises:
        ConfigError: nothing of the kind is there, or a setting cannot work.
    """
    place = place_of(device)
    path = Path(path)
    if RunDir(path).identity.is_file():
        path = trained_teacher(RunDir(path))
    kind = kind or kind_of(path)
    check(kind in TEACHERS, f"kind={kind} is none of: {', '.join(TEACHERS)}")
    config = made_of(TEACHERS[kind], f"a teacher of kind {kind}", path=str(path), **settings)
    if config.precision == "auto":
        config.precision = "fp32"
    return Teacher(teachers.build_teacher(config, place), config, place)


def trained_teacher(run: RunDir) -> Path:
    """The newest model folder of the teacher that a run trained."""
    found = sorted((run.teacher.root / "models").glob("step_*"))
    check(
        len(found) > 0,
        f"{run.root} trained no teacher of its own; name the teacher's folder, as its config.yaml "
        "has it at teacher.NAME.path",
    )
    return found[-1]


def kind_of(path: Path) -> str:
    """The kind of teacher that the files of `path` tell."""
    if (path / model_files.DESCRIPTION).is_file():
        return "native"
    if any((path / name).is_file() for name in ("model_index.json", "config.json")):
        return "diffusers"
    return "analytic" if str(path) in analytic.PRESETS or path.suffix == ".json" else "checkpoint"


def place_of(device: Device) -> torch.device:
    """`device`; a GPU when none is named and there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


# -----------------------------------------------------------------------------------------------
# Trajectories


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of one or more teachers from shared noise, in memory.

    Attributes:
        shard: states [N, M, K+1, C, H, W], labels and ids of N samples and M teachers.
        times: of the states, K+1 numbers from 0 to 1.
        weights: convex weights of the teachers: a row for each class, or one for all.
        seed: of the noise.
        grid: K.
    """

    shard: GeneratedShard
    times: Tensor
    weights: Tensor
    seed: int
    grid: int

    @property
    def noise(self) -> Tensor:
        """x_0 [N, C, H, W]."""
        return self.shard.states[:, 0, 0]

    @property
    def images(self) -> Tensor:
        """What the last, best teacher makes of it [N, C, H, W]; pictures are in [-1, 1]."""
        return self.shard.states[:, -1, -1]

    @property
    def labels(self) -> Tensor:
        """Class of each sample [N], -1 for none."""
        return torch.from_numpy(self.shard.labels)

    def __len__(self) -> int:
        return len(self.shard.ids)

    def batch(self, rows: np.ndarray) -> TrajectoryBatch:
        """The samples `rows` [B] as a whole global batch."""
        chosen, labels = torch.from_numpy(rows), self.labels[torch.from_numpy(rows)]
        return TrajectoryBatch(
            states=self.shard.states[chosen],
            times=self.times,
            weights=self.weights[labels.clamp(0, len(self.weights) - 1)],
            condition=labels,
            ids=torch.from_numpy(self.shard.ids)[chosen],
            positions=torch.arange(len(rows)),
            global_size=len(rows),
        )


def make_trajectories(
    teacher: Teacher | Sequence[Teacher],
    num: int,
    grid: int = 8,
    seed: int = 0,
    batch_size: int = 256,
) -> Trajectories:
    """`num` trajectories, stored at t = 0, 1/grid .. 1; several teachers share the noise, weakest
    first. Sample i is the one that a run of the same seed makes with id i.

    Raises:
        ConfigError: `teacher.config.steps` is no multiple of `grid`, teachers of different images,
            or values that are not finite.
    """
    given = [teacher] if isinstance(teacher, Teacher) else list(teacher)
    names = {f"teacher{k}" if k else "teacher": one for k, one in enumerate(given)}
    models = {name: one.model for name, one in names.items()}
    configs = {name: one.config for name, one in names.items()}
    check(num > 0, f"num={num} must be above 0")
    image = common_image(models)
    settings = TrajectoryConfig(grid=grid, samples_per_shard=num, batch_size=batch_size)
    shard = generate_shard(models, configs, settings, seed, 0, given[-1].device)
    table = torch.tensor(weight_table(configs, image.num_classes))
    return Trajectories(shard, torch.linspace(0, 1, grid + 1), table, seed, grid)


# -----------------------------------------------------------------------------------------------
# Objectives and students


def make_objective(name: str, **settings: Any) -> ObjectiveConfig:
    """The objective of a name, as `objective=NAME` and `objective.KEY=VALUE` of the command line.

    Raises:
        ConfigError: an unknown name or key, or a value that cannot work.
    """
    return preset("objective", name, OBJECTIVES, settings)


def make_student(
    teacher: Teacher | ImageSpec, network: str = "", seed: int = 0, **settings: Any
) -> sample.Student:
    """A student that has learned nothing yet, on the teacher's device.

    Without `network` it has the architecture of its teacher and starts as it, bit for bit.
    Otherwise `network` is a name of `student=NAME`, such as "dit_digits", and `settings` are its
    own; it starts as the teacher where it is the same network.

    Raises:
        ConfigError: the teacher is no network that a student can start as; an unknown name or key.
    """
    image = teacher if isinstance(teacher, ImageSpec) else teacher.image
    start = None if isinstance(teacher, ImageSpec) else teachers.start_of(teacher.config)
    config: NetworkConfig | None = start.config if start else None
    if network:
        config = preset("student", network, NETWORKS, settings)
    if config is None:
        raise ConfigError(
            "there is no network that the student could start as; name one, network=NAME, of: "
            + ", ".join(presets("student", NETWORKS))
        )
    made = start and model_files.with_weights_of(start, config, image)
    module = made or build.build_network(config, image, seed)
    place = torch.device("cpu") if isinstance(teacher, ImageSpec) else teacher.device
    return _student(module, {"kind": "student"}, place)


def _student(
    network: layers.AbstractNetwork, meta: dict[str, Any], device: torch.device
) -> sample.Student:
    about = {"network": asdict(network.config), "image": asdict(network.image)}
    network = network.to(device).eval().requires_grad_(False)
    return sample.Student(network, network.image, about | meta, device)


def presets(group: str, kinds: dict[str, type]) -> list[str]:
    """Names of a group of settings: those of its files, and of its classes."""
    there = [file.name for file in (files("bowstring_configs") / group).iterdir()]
    return sorted({name.removesuffix(".yaml") for name in there} - {"teacher"} | kinds.keys())


def preset(
    group: str, name: str, kinds: dict[str, type[Settings]], settings: dict[str, Any]
) -> Settings:
    """The settings of a file of configs/GROUP, or of a class's name, and what differs from it."""
    known = presets(group, kinds)
    check(name in known, f"{group}={name} is not known; choose one of: {', '.join(known)}")
    file = files("bowstring_configs") / group / f"{name}.yaml"
    stored: dict[str, Any] = {"defaults": [f"base_{name}"]}
    if file.is_file():
        stored = OmegaConf.to_container(OmegaConf.create(file.read_text()))  # type: ignore[assignment]
    kind = kinds[stored.pop("defaults")[0].removeprefix("base_")]
    return made_of(kind, f"{group}={name}", **{**stored, **settings})


def made_of(kind: type[Settings], what: str, **settings: Any) -> Settings:
    """A dataclass of settings. Raises ConfigError for a key that it has not."""
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for key in settings:
        check(key in known, f"{what} has no setting {key}; it has: {', '.join(known)}")
    return kind(**settings)


# -----------------------------------------------------------------------------------------------
# Training


class _Memory:
    """Trajectories in memory as the loop's source: each is seen once before any is seen again."""

    wait_s = 0.0

    def __init__(self, trajectories: Trajectories, config: TrainConfig) -> None:
        self._trajectories, size = trajectories, len(trajectories)
        passes = -(-config.max_steps * config.batch_size // size)
        self._order = Order(trajectories.seed, size, passes, config.batch_size)

    def read(self, step: int) -> TrajectoryBatch:
        return self._trajectories.batch(self._order.entries(step)[0])


def train(
    student: sample.Student,
    trajectories: Trajectories,
    objective: ObjectiveConfig | Objective,
    steps: int = 100,
    batch_size: int = 64,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> sample.Student:
    """A new student: `student` after `steps` more, its weights averaged as those of a run are.

    `objective` is one of `make_objective`, or your own: an object with the method `loss` of
    `bowstring.Objective`. `settings` are those of the command line's `train`: lr, warmup_steps ..
    `callbacks` hang on the loop: their `step` hears of every loss. Nothing is written to disk.

    Raises:
        ConfigError: settings that cannot work together, such as times that the trajectories lack.
        TrainingError: a loss or gradient is not finite.
    """
    config = made_of(TrainConfig, "train", max_steps=steps, batch_size=batch_size, **settings)
    alone = {"precision": "fp32", "compile": False, "offload": "none"}
    for key, value in alone.items():
        check(
            getattr(config, key) == value,
            f"train.{key}={getattr(config, key)} is for a run (bowstring run); here it is {value}",
        )
    shape = tuple(trajectories.noise.shape[1:])
    check(
        student.image.shape == shape,
        f"the trajectories are of images {shape}, and the student makes {student.image.shape}",
    )
    network = copy.deepcopy(student.network).train().requires_grad_(True)
    engine = TorchEngine(network, config, student.device)
    if isinstance(objective, ObjectiveConfig):
        objective.check_run(config, trajectories.grid, list(range(trajectories.grid + 1)))
        name, middle = objective.name, objective.middle
        norms, place = engine.gradient_norms, engine.device
        loss = build_objective(objective, trajectories.seed, place, norms, config.max_steps)
    else:
        name, middle, loss = type(objective).__name__, EVEN, objective
    loop.train(engine, _Memory(trajectories, config), loss, config, callbacks)
    done = student.meta.get("step", 0) + steps
    about = {"kind": "student", "objective": name, "middle": middle}
    about |= {"step": done, "seed": trajectories.seed}
    return _student(engine.averaged, about, student.device)


# -----------------------------------------------------------------------------------------------
# Comparison


class Comparison(NamedTuple):
    """`distance_to_teacher` at `nfe` evaluations: of the student, and of the teacher by Euler's
    method. 0 is the teacher's fine solution, 1 is the noise.
    """

    nfe: int
    student: float
    teacher: float


def compare(
    student: sample.Student,
    teacher: Teacher,
    nfe: Sequence[int] = (1, 2, 4),
    num: int = 256,
    seed: int = 12345,
) -> list[Comparison]:
    """How far the student, and the teacher stopped as early, end from the teacher's fine solution.

    The noise of `seed` is not that of a training, whose seed is 0 unless said.

    Raises:
        ConfigError: the student was trained on this seed.
    """
    from distill.evaluation.metrics import relative_distance  # as long to import as all the rest

    check(
        student.meta.get("seed") != seed,
        f"seed={seed} is that of the trajectories, so its samples were trained on; take another",
    )
    samples = sampling.evaluation_samples(EvalConfig(num_samples=num, seed=seed), student.image)
    solver, fine = curves.truth(teacher.config, EvalConfig())
    reference = teacher.solve(samples.noise, samples.labels, fine, solver)
    coarse = "jumps" if solver == "jumps" else "euler"

    def distance(x: Tensor) -> float:
        return relative_distance(x, reference, samples.noise)

    rows = []
    for n in nfe:
        jumped = student.jump(samples.noise, samples.labels, n)
        solved = teacher.solve(samples.noise, samples.labels, n, coarse)
        rows.append(Comparison(n, distance(jumped), distance(solved)))
    return rows
