"""Settings of the method side as plain dataclasses. No torch, so a login node can check a run.

Hydra composes YAML into these classes; nothing past the command line sees an untyped tree. A wrong
value is a `ConfigError` that names the key, the value and the way out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

# Network evaluations of one step of a solver; "jumps" are those of a student's own map G.
NFE_PER_STEP = {"euler": 1, "heun": 2, "rk4": 4, "jumps": 1}


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value and what to do."""


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
# Data and networks


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


@dataclass
class DataConfig:
    """The real images a teacher is trained on and a student is compared with.

    `latents` has none: the run's teacher comes from elsewhere, and only distances to it are taken.
    """

    name: str = MISSING  # digits | fashion | npz | latents
    path: str = ""  # fashion: folder with the files, "" is the usual one; npz: the file
    channels: int = MISSING
    size: int = MISSING  # height = width, pixels, after padding
    num_classes: int = 0  # 0: unconditional

    def __post_init__(self) -> None:
        check_choice("data.name", self.name, ("digits", "fashion", "npz", "latents"))
        check_positive("data", channels=self.channels, size=self.size)
        check(
            self.name != "latents" or not self.image.is_picture,
            f"data.name=latents with data.channels={self.channels}: grey and RGB images are "
            "compared with real ones; set data.name=npz and data.path",
        )

    @property
    def image(self) -> ImageSpec:
        """Shape and classes of the images."""
        return ImageSpec(self.channels, self.size, self.num_classes)


@dataclass
class NetworkConfig:
    """Base of the network variants; one subclass per architecture."""

    name: str = MISSING  # dit | unet


@dataclass
class DiTConfig(NetworkConfig):
    """Diffusion transformer with SiT's parameter names (Ma et al., 2024)."""

    name: str = "dit"
    patch_size: int = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_positive("student", patch_size=self.patch_size, width=self.width)
        check_positive("student", depth=self.depth, num_heads=self.num_heads)
        check(
            self.width % self.num_heads == 0,
            f"student.width={self.width} must be a multiple of student.num_heads={self.num_heads}",
        )


@dataclass
class UNetConfig(NetworkConfig):
    """U-Net in the manner of ADM and DDPM++ (Dhariwal and Nichol, 2021; Song et al., 2021)."""

    name: str = "unet"
    width: int = 64
    channel_mults: list[int] = field(default_factory=lambda: [1, 2, 2])
    blocks_per_level: int = 2
    attention_sizes: list[int] = field(default_factory=lambda: [16])  # map heights that get it
    num_heads: int = 4

    def __post_init__(self) -> None:
        check_positive("student", width=self.width, num_heads=self.num_heads)
        check_positive("student", blocks_per_level=self.blocks_per_level)
        check(len(self.channel_mults) > 0, "student.channel_mults=[] needs at least one level")
        check(
            self.width % self.num_heads == 0,
            f"student.width={self.width} must be a multiple of student.num_heads={self.num_heads}",
        )


# -----------------------------------------------------------------------------------------------
# Teachers and trajectories


@dataclass
class TeacherConfig:
    """One frozen teacher and how its ODE is solved.

    Several teachers may differ in everything but the shape of the images and the stored grid.
    """

    kind: str = "native"  # native | analytic | sit | diffusers | edm
    path: str = ""  # folder or file with the weights; native: also the folder of an earlier run
    solver: str = "heun"  # euler | heun | rk4 | jumps (of a student)
    steps: int = 16  # fixed solver steps from noise to data; a multiple of trajectory.grid
    guidance: float = 1.0  # scale w of v = v_null + w (v_label - v_null); 1 is off
    weight: float = 1.0  # convex weight among several teachers, before normalisation
    num_heads: int = 0  # of a SiT checkpoint, which does not tell; 0: that of the published size

    def __post_init__(self) -> None:
        check_choice("teacher.kind", self.kind, ("native", "analytic", "sit", "diffusers", "edm"))
        check_choice("teacher.solver", self.solver, tuple(NFE_PER_STEP))
        check(
            self.solver != "jumps" or (self.kind == "native" and self.guidance == 1),
            f"teacher.solver=jumps with teacher.kind={self.kind} and teacher.guidance="
            f"{self.guidance} cannot work: only a student jumps, and guidance is in it already; "
            "set teacher.kind=native and teacher.guidance=1",
        )
        check_positive("teacher", steps=self.steps, weight=self.weight)


def check_location(location: str) -> None:
    """Raises ConfigError unless trajectory.location may be written into files and messages."""
    protocol, is_url, rest = location.partition("://")
    # Not repeated in the message: it is a secret.
    check(
        not is_url or not set("@?*[") & set(rest),
        f"trajectory.location={protocol}://... must be a plain address without user, password, "
        "question mark or pattern; credentials come from the environment (docs/operations.md)",
    )
    check(
        protocol != "file" or not is_url,
        f"trajectory.location={location}: give a folder as a path, without file://",
    )


@dataclass
class TrajectoryConfig:
    """The trajectory stream: what a shard holds and in which order it is read (docs/formats.md)."""

    grid: int = 8  # K: the solver passes t = 0, 1/K .. 1
    store_points: list[int] = field(default_factory=list)  # k of the stored k/K; []: 0 .. K
    samples_per_shard: int = 256
    block_shards: int = 4  # shards shuffled together
    passes: int = 4  # times each block is read before the next
    dtype: str = "float16"  # float16 | bfloat16 | float32, as stored
    store_noise: bool = True  # false: the reader makes it again from the sample id
    batch_size: int = 256  # samples a teacher integrates at once, if its memory suffices
    ready_ahead: int = 16  # shards at most beyond the block that is read
    location: str = ""  # of the shards: a folder or an fsspec URL; "" is shards in the run's folder
    max_bytes: int = 20_000_000_000  # shards at most on disk, bytes
    wait_timeout_s: float = 900.0  # without a new shard, then a reader fails

    def __post_init__(self) -> None:
        check_positive(
            "trajectory",
            grid=self.grid,
            samples_per_shard=self.samples_per_shard,
            block_shards=self.block_shards,
            passes=self.passes,
            batch_size=self.batch_size,
            wait_timeout_s=self.wait_timeout_s,
        )
        check_choice("trajectory.dtype", self.dtype, ("float16", "bfloat16", "float32"))
        check_location(self.location)
        check(
            self.points == sorted({*self.points})
            and (self.points[0], self.points[-1]) == (0, self.grid),
            f"trajectory.store_points={self.store_points} must rise from 0, the noise, to "
            f"trajectory.grid={self.grid}, the image",
        )
        check(
            self.ready_ahead >= self.block_shards,
            f"trajectory.ready_ahead={self.ready_ahead} must be at least trajectory.block_shards="
            f"{self.block_shards}, or the reader would wait for a block that may not be made",
        )

    @property
    def points(self) -> list[int]:
        """The grid points k that are stored, t = k/K; 0 and K are among them."""
        return list(self.store_points) or list(range(self.grid + 1))

    @property
    def block_samples(self) -> int:
        """Samples in one block."""
        return self.block_shards * self.samples_per_shard


# -----------------------------------------------------------------------------------------------
# Training and evaluation


# The ZeRO stages at which each can be had. Parameters leave the device at stage 3 alone, which does
# without them between two uses; stage 0 shares nothing, and the masters are nobody's to move.
OFFLOAD_STAGES = {
    "none": (0, 1, 2, 3),
    "optimizer": (1, 2, 3),
    "optimizer_and_parameters": (3,),
}


@dataclass
class TrainConfig:
    """One optimisation: of a student on trajectories, or of a teacher on real images."""

    max_steps: int = 800
    batch_size: int = 256  # global, over all ranks and accumulation steps
    micro_batch: int = 0  # samples a rank takes at once; 0: no gradient accumulation
    lr: float = 1e-3
    warmup_steps: int = 20
    decay: str = "cosine"  # constant | cosine (to 0 at max_steps)
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    grad_clip: float = 1.0  # largest global gradient norm; 0 is off
    zero_stage: int = 1  # what ranks share: 0 nothing, 1 moments, 2 gradients too, 3 weights too
    # What lies in host memory between its uses: none | optimizer | optimizer_and_parameters
    offload: str = "none"
    precision: str = "fp32"  # fp32 | bf16 | fp16
    activation_checkpointing: bool = False  # less memory: a pass back computes blocks again
    compile: bool = False  # torch.compile, for GPUs; not at stage 3
    ema_target: float = 0.95  # decay of the average the objectives use as target
    ema_evaluation: float = 0.99  # decay of the average that is evaluated and exported
    log_every: int = 10  # steps
    save_every: int = 100  # steps
    keep_last: int = 2  # checkpoints
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for good; 0: none
    save_async: bool = False  # training waits for the copy to host memory only
    wandb: str = ""  # project at Weights & Biases that gets the metrics too; "": none
    profile: bool = False  # every start traces a few steps, into the run's folder
    label_dropout: float = 0.1  # chance that a label becomes "none"; of a teacher's training only

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
    export_steps: list[int] = field(default_factory=list)  # extra exports before the last step


@dataclass
class ExtractorConfig:
    """The features behind the Fréchet and kernel distances."""

    name: str = "pixels"  # pixels | inception
    weights: str = ""  # file, for inception

    def __post_init__(self) -> None:
        check_choice("eval.extractor.name", self.name, ("pixels", "inception"))


@dataclass
class EvalConfig:
    """Evaluation of a finished student."""

    num_samples: int = 2000
    seed: int = 12345
    batch_size: int = 500
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    teacher_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    euler_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    reference_steps: int = 32  # Heun steps of the teacher's fine solution, the truth
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)

    def __post_init__(self) -> None:
        check_positive(
            "eval",
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            reference_steps=self.reference_steps,
        )
        check(
            all(n > 0 for n in [*self.nfe, *self.teacher_nfe, *self.euler_nfe]),
            "eval.nfe, eval.teacher_nfe and eval.euler_nfe must be above 0",
        )
