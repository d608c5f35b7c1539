"""Settings of the method side as plain dataclasses. No torch, so a login node can check a run.

Hydra composes YAML into these classes; nothing past the command line sees an untyped tree. A wrong
value is a `ConfigError` that names the key, the value and the way out.
"""

from collections.abc import Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

FREE, SINCE = "free", "since"


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value and what to do."""


class LossyExport(RuntimeError):
    """What was written does not give what was trained. It was taken away again."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    check(value in choices, f"{key}={value} is not known; choose one of: {', '.join(choices)}")


def check_positive(prefix: str, **values: float | int) -> None:
    """Raises ConfigError unless every value is above zero."""
    for name, value in values.items():
        check(value > 0, f"{prefix}.{name}={value} must be above 0")


# -----------------------------------------------------------------------------------------------
# What belongs to a run


def free(default: Any, of: str = "") -> Any:
    """A field that a resume may change, of a settings dataclass; any other field belongs to what
    the run is, and another value is another run (`cluster.state.identity`).

    `default` may be a function that makes it. With `of` it is free in that section alone, such as
    "train", where a class serves two.
    """
    return _field(default, {FREE: of})


def since(version: str, default: Any, before: Any) -> Any:
    """A field of a settings dataclass that came with `version`. A new run begins with `default`; a
    run that is older than the setting counts as having `before`, under which nothing changes.
    (Of another field it counts as having the default.)

    Both may be functions that make them.
    """
    return _field(default, {SINCE: Since(version, before)})


@dataclass(frozen=True)
class Since:
    """When a setting came, and what was so before."""

    version: str
    before: Any


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def is_free(setting: Field[Any], section: str) -> bool:
    """Whether a field was made by `free`, for the section of a run's settings that it stands in."""
    return setting.metadata.get(FREE) in ("", section)


def before(setting: Field[Any]) -> Any:
    """What a run that is older than a setting counts as having; MISSING if it must have it."""
    if SINCE in setting.metadata:
        value = setting.metadata[SINCE].before
        return value() if callable(value) else value
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def lacking(kind: Any, there: Collection[Any]) -> dict[str, Any]:
    """What a run that has the settings `there` of the dataclass `kind` counts as having of the
    others that `since` marks.
    """
    late = [one for one in fields(kind) if SINCE in one.metadata and one.name not in there]
    return {one.name: before(one) for one in late}


# -----------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class ImageSpec:
    """What a network or teacher works on: square images [channels, size, size] with classes."""

    channels: int
    size: int
    num_classes: int  # 0: unconditional

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.size, self.size)

    @property
    def is_picture(self) -> bool:
        """Whether the channels are grey or RGB, rather than a latent space."""
        return self.channels in (1, 3)


# -----------------------------------------------------------------------------------------------
# Training


# The ZeRO stages at which each can be had. Parameters leave the device at stage 3 alone, which does
# without them between two uses; stage 0 shares nothing, and the masters are nobody's to move.
OFFLOAD_STAGES = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "optimizer_and_parameters": (3,)}


@dataclass
class TrainConfig:
    """One optimisation: of a student on trajectories, or of a teacher on real images.

    A student can be trained further. With cosine decay a longer run has another learning rate from
    the step where it is resumed; that is said at the start, and written into run.json.
    """

    max_steps: int = free(800, of="train")  # optimizer steps
    batch_size: int = 256  # global, over all ranks and accumulation steps
    micro_batch: int = free(0)  # samples a rank takes at once; 0: no gradient accumulation
    lr: float = 1e-3  # the highest, after the warm-up
    warmup_steps: int = 20  # in which it rises, linearly
    decay: str = "cosine"  # constant | cosine (to 0 at max_steps)
    weight_decay: float = 0.0  # of AdamW, on matrices
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # of AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0 is off
    # What ranks share: 0 nothing, 1 moments, 2 gradients too, 3 weights too
    zero_stage: int = free(1)
    # What lies in host memory between its uses: none | optimizer | optimizer_and_parameters
    offload: str = free("none")
    precision: str = "fp32"  # fp32 | bf16 | fp16
    activation_checkpointing: bool = free(False)  # less memory: a pass back computes blocks again
    compile: bool = free(False)  # torch.compile, for GPUs; not at stage 3
    ema_target: float = 0.95  # decay of the average the objectives use as target
    ema_evaluation: float = 0.99  # decay of the average that is evaluated and exported
    log_every: int = free(10)  # steps
    save_every: int = free(100)  # steps
    keep_last: int = free(2)  # checkpoints
    keep_every: int = free(0)  # steps; checkpoints at multiples of it are kept for good; 0: none
    save_async: bool = free(False)  # training waits for the copy to host memory only
    wandb: str = free("")  # project at Weights & Biases that gets the metrics too; "": none
    profile: bool = free(False)  # every start traces a few steps, into the run's folder
    # Chance that a label becomes "none"; of a teacher's training only
    label_dropout: float = free(0.1, of="train")

    def __post_init__(self) -> None:
        check_positive(
            "train",
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            log_every=self.log_every,
            save_every=self.save_every,
            keep_last=self.keep_last,
        )
        check_choice("train.decay", self.decay, ("constant", "cosine"))
        check_choice("train.precision", self.precision, ("fp32", "bf16", "fp16"))
        check(0 <= self.zero_stage <= 3, f"train.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        check_choice("train.offload", self.offload, tuple(OFFLOAD_STAGES))
        stages = OFFLOAD_STAGES[self.offload]
        check(
            self.zero_stage in stages,
            f"train.offload={self.offload} does not work with train.zero_stage={self.zero_stage}; "
            f"set train.zero_stage={' or '.join(map(str, stages))}, or train.offload=none",
        )
        check(
            self.keep_every >= 0 and self.keep_every % self.save_every == 0,
            f"train.keep_every={self.keep_every} must be a multiple of train.save_every="
            f"{self.save_every}, or 0",
        )
        check(
            not self.compile or self.zero_stage < 3,
            "train.compile=true does not work with train.zero_stage=3, whose weights come and go; "
            "set train.zero_stage=2, or train.compile=false",
        )
        check(len(self.betas) == 2, f"train.betas={self.betas} must be two numbers")
        for name in ("ema_target", "ema_evaluation"):
            value = getattr(self, name)
            check(0 <= value < 1, f"train.{name}={value} must be at least 0 and below 1")

    def is_shared_by(self, world_size: int) -> bool:
        """Whether `world_size` ranks have the same number of whole micro-batches."""
        return self.batch_size % (world_size * max(self.micro_batch, 1)) == 0

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one step on each of `world_size` ranks.

        Raises:
            ConfigError: the batch cannot be divided so.
        """
        part = max(self.micro_batch, 1)
        if not self.is_shared_by(world_size):
            micro = f" in micro-batches of {part}" if self.micro_batch else ""
            fitting = [n for n in range(1, world_size) if self.is_shared_by(n)]
            way = f"{fitting[-1]} can" if fitting else "set another train.micro_batch"
            raise ConfigError(
                f"{world_size} ranks (cluster.trainer.num_workers) cannot share "
                f"train.batch_size={self.batch_size} evenly{micro}; {way}"
            )
        return self.batch_size // (world_size * part) if self.micro_batch else 1


@dataclass
class PretrainConfig:
    """Trains a rectified-flow teacher with the student's architecture when the user has none."""

    train: TrainConfig = field(default_factory=TrainConfig)
    export_steps: list[int] = free(list)  # extra exports before the last step
