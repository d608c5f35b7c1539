"""Settings of the teachers, one dataclass per kind. No torch."""

from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from distill.config import check, check_choice, check_positive, free, since
from distill.flow.times import NFE_PER_STEP

PATH_TYPES = ("linear", "gvp", "vp", "ddpm")
PREDICTIONS = ("velocity", "noise", "data", "score", "v")
TIMES = ("noise_to_data", "data_to_noise")
PRECISIONS = ("auto", "fp32", "tf32", "bf16")


@dataclass
class TeacherConfig:
    """Base of the kinds: a frozen teacher and how its ODE is solved; one subclass per kind.

    Several teachers may differ in everything but the shape of the images and the stored grid.

    Attributes:
        is_from_run: a run makes such teachers: by pre-training, and as its student, which can jump.
            `path` may be that run.
        may_be_name: `path` may also name something that is built in.
    """

    kind: str = MISSING  # a row of TEACHERS
    path: str = ""  # folder or file with the weights
    solver: str = "heun"  # euler | heun | rk4 | jumps (of a student)
    steps: int = 16  # fixed solver steps from noise to data; a multiple of trajectory.grid
    guidance: float = 1.0  # scale w of v = v_null + w (v_label - v_null); 1 is off
    # Among several teachers, before normalisation: a number, or a list of one for each class
    weight: Any = 1.0
    guided_channels: int = 0  # that guidance moves, first ones; 0: all. SiT and DiT: 3 of 4
    # auto | fp32 | tf32 | bf16; auto: bf16 where the teachers have GPUs, else fp32
    precision: str = since("0.3.0", "auto", before="fp32")
    compile: bool = free(False)  # torch.compile, for GPUs
    trial: bool = free(True)  # whether one that its own samples speak against is refused

    is_from_run: ClassVar[bool] = False
    may_be_name: ClassVar[bool] = False

    def __post_init__(self) -> None:
        assert TEACHERS.get(self.kind) is type(self), f"{type(self).__name__} of kind {self.kind}"
        check_choice("teacher.solver", self.solver, tuple(NFE_PER_STEP))
        check_choice("teacher.precision", self.precision, PRECISIONS)
        check(
            self.solver != "jumps" or (self.is_from_run and self.guidance == 1),
            f"teacher.solver=jumps with teacher.kind={self.kind} and teacher.guidance="
            f"{self.guidance} cannot work: only a student jumps, and guidance is in it already; "
            "set teacher.kind=native and teacher.guidance=1",
        )
        check_positive("teacher", steps=self.steps)
        given = self.weight if isinstance(self.weight, list) else [self.weight]
        check(
            all(type(one) in (int, float) and one >= 0 for one in given) and any(given),
            f"teacher.weight={self.weight} must be a number above 0, or a list with one for each "
            "class, in which 0 leaves that class to the other teachers",
        )
        check(
            self.guided_channels >= 0,
            f"teacher.guided_channels={self.guided_channels} must be a number of channels, or 0",
        )


@dataclass
class NativeConfig(TeacherConfig):
    """A model folder: `bowstring pretrain` or `bowstring export` wrote it.

    To the command line also the folder of an earlier run, for its student.
    """

    kind: str = "native"
    is_from_run = True


@dataclass
class AnalyticConfig(TeacherConfig):
    """A name of `analytic.PRESETS`, or a JSON file with a Gaussian mixture."""

    kind: str = "analytic"
    may_be_name = True


@dataclass
class ConventionConfig(TeacherConfig):
    """Base of the kinds whose models may have been trained in another convention than ours.

    What files say is believed; these settings are for what they do not say, and win
    (`distill.teachers.conventions`).
    """

    path_type: str = ""  # linear | gvp | vp | ddpm; "": as the file says, or linear
    prediction: str = ""  # velocity | noise | data | score | v; "": as the file says, or velocity
    time: str = ""  # noise_to_data | data_to_noise; "": as the file says, or as the kind has it
    num_classes: int = 0  # 0: rows of the label table less one, which is "none"
    image_size: int = 0  # in pixels, where the files do not tell it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("teacher.path_type", self.path_type or PATH_TYPES[0], PATH_TYPES)
        check_choice("teacher.prediction", self.prediction or PREDICTIONS[0], PREDICTIONS)
        check_choice("teacher.time", self.time or TIMES[0], TIMES)


@dataclass
class CheckpointConfig(ConventionConfig):
    """A file of weights that public training code wrote, .pt, .pth, .bin or .safetensors, or a
    folder with it: `checkpoint.LAYOUTS` says of which networks.
    """

    kind: str = "checkpoint"
    weights: str = ""  # which, of several sets in the file; "": the average
    num_heads: int = 0  # where the file does not tell; 0: that of the published size


@dataclass
class SiTConfig(CheckpointConfig):
    """As `checkpoint`; the name it had when SiT's were the only ones."""

    kind: str = "sit"


@dataclass
class DiffusersConfig(ConventionConfig):
    """A folder of diffusers: of one model, config.json and its safetensors, or of a pipeline."""

    kind: str = "diffusers"


@dataclass
class EdmConfig(CheckpointConfig):
    """A model folder whose network was trained with EDM's preconditioning; else as `checkpoint`."""

    kind: str = "edm"


TEACHERS: dict[str, type[TeacherConfig]] = {
    "native": NativeConfig,
    "analytic": AnalyticConfig,
    "checkpoint": CheckpointConfig,
    "sit": SiTConfig,
    "diffusers": DiffusersConfig,
    "edm": EdmConfig,
}


def weight_table(teachers: dict[str, TeacherConfig], num_classes: int) -> list[list[float]]:
    """Convex weights of the teachers, in their order: a row for each class; one row for all where
    no weight depends on the class.

    Raises:
        ConfigError: a list is not as long as there are classes, or nobody teaches one of them.
    """
    if not any(isinstance(teacher.weight, list) for teacher in teachers.values()):
        total = sum(teacher.weight for teacher in teachers.values())
        return [[teacher.weight / total for teacher in teachers.values()]]
    columns = []
    for name, teacher in teachers.items():
        given = teacher.weight if isinstance(teacher.weight, list) else None
        check(
            given is None or len(given) == num_classes,
            f"teacher.{name}.weight={given} must have one number for each of the {num_classes} "
            "classes, or be one number",
        )
        columns.append(given or [teacher.weight] * num_classes)
    rows = list(zip(*columns, strict=True))
    for label, row in enumerate(rows):
        check(
            sum(row) > 0,
            f"teacher.*.weight is 0 for class {label} of every teacher; give one of them a weight",
        )
    return [[weight / sum(row) for weight in row] for row in rows]
