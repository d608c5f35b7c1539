"""Settings of the objectives, one dataclass each, and what is known of a loss without running it:
what it calls, and what it cannot be trained with. No torch.
"""

from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from distill.config import TrainConfig, check, check_choice, check_positive, since
from distill.flow.times import DRILLED, EVEN, sampler_times

# -----------------------------------------------------------------------------------------------
# What a loss calls


@dataclass(frozen=True)
class Calls:
    """Network calls of one training sample: with gradient to the weights, without, with gradient
    to the input, and forward-mode derivatives (a value and its tangent, two forwards).

    What only some samples call counts by their share.

    `passes` are no calls: adaptive weights go back through a call once more, for the gradient of
    its term at the last layer.
    """

    weights: int | float = 0
    plain: int | float = 0
    inputs: int | float = 0
    tangents: int | float = 0
    passes: int | float = 0

    @property
    def forwards(self) -> int | float:
        """All of them, in forwards."""
        return self.weights + self.plain + self.inputs + 2 * self.tangents

    @property
    def in_forwards(self) -> int | float:
        """Work in units of one forward: a backward pass costs one for the inputs and one for the
        weights.
        """
        once = self.plain + self.passes
        return 3 * self.weights + once + 2 * self.inputs + 2 * self.tangents

    def __add__(self, other: "Calls") -> "Calls":
        return Calls(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


ONE = Calls(weights=1)
CONSISTENCY = Calls(weights=1, plain=2, inputs=1)
# The target of `eulerian_target`, by the derivative it takes: exact, or over a small step.
EULERIAN = {"jvp": Calls(weights=1, tangents=1), "finite_difference": Calls(weights=1, plain=1)}


def counted(*weighted: tuple[float, Calls]) -> Calls:
    """The calls of terms (weight, calls); one of weight 0 is not computed."""
    return sum((calls for weight, calls in weighted if weight > 0), Calls())


# -----------------------------------------------------------------------------------------------
# Settings


@dataclass
class ObjectiveConfig(ABC):
    """Base of the objectives. `distance` is the pointwise distance D of the loss terms.

    Attributes:
        middle: where the second of two jumps of its student begins.
    """

    middle: ClassVar[float] = EVEN

    name: str = MISSING  # a row of OBJECTIVES
    distance: str = "pseudo_huber"  # l2 | pseudo_huber | lpips (RGB images only)
    lpips_backbone: str = ""  # file of torchvision's VGG16 weights, for lpips

    def __post_init__(self) -> None:
        check_choice("objective.distance", self.distance, ("l2", "pseudo_huber", "lpips"))
        check(
            self.distance != "lpips" or self.lpips_backbone != "",
            "objective.distance=lpips needs objective.lpips_backbone, the file of torchvision's "
            "VGG16 weights",
        )

    @abstractmethod
    def calls(self) -> Calls:
        """Network calls of one training sample. `estimate` and the FLOP/s of a training follow."""

    @abstractmethod
    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """Raises ConfigError unless the loss works with the rest of the run: how it is trained, and
        the teachers' states, which are stored at k / `grid` for k in `points`.
        """


def check_eulerian(name: str, derivative: str, train: TrainConfig) -> None:
    """Raises ConfigError for a derivative over a small step in 16 bits: it is lost in rounding
    (tests/distill/objectives/test_precision.py).
    """
    check(
        train.precision == "fp32" or derivative != "finite_difference",
        f"train.precision={train.precision} is too coarse for objective={name} with "
        "objective.derivative=finite_difference; set objective.derivative=jvp",
    )


def check_weights(**weights: float) -> None:
    """Raises ConfigError unless no weight is below 0 and one is above."""
    for name, weight in weights.items():
        check(weight >= 0, f"objective.weight_{name}={weight} must not be below 0; 0 is off")
    check(any(weights.values()), f"all weights of the objective are 0: {', '.join(weights)}")


def check_share(**shares: float) -> None:
    """Raises ConfigError unless every share, or chance, is between 0 and 1."""
    for name, share in shares.items():
        check(0 <= share <= 1, f"objective.{name}={share} must be between 0 and 1")


def check_power_of_two(name: str, value: int, least: int) -> None:
    """Raises ConfigError unless `value` is a power of 2, and at least `least`."""
    check(
        value >= least and value & (value - 1) == 0,
        f"objective.{name}={value} must be a power of 2, at least {least}",
    )


# Of drawn targets (`distill.objectives.drawn`), in the order in which they are drawn
KINDS = ("output", "start", "end", "change", "consistency")


@dataclass
class DrawnConfig(ObjectiveConfig, ABC):
    """Drawn targets: the share of samples that draw a kind; `change` has what the others leave."""

    share_output: float = 0.15  # of samples that draw the whole way, noise to output
    share_start: float = 0.1  # .. a jump that begins at noise
    share_end: float = 0.2  # .. a jump that ends at the output
    share_consistency: float = 0.05  # .. a jump that two of the student's own are to equal
    power: float = 0.3  # of the length of a jump, in the loss: 0 velocities, 1 landings

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: share for name, share in self.shares().items() if name != "change"}
        for name, share in given.items():
            check(share >= 0, f"objective.share_{name}={share} must not be below 0; 0 is off")
        words = " + ".join(f"objective.share_{name}={share}" for name, share in given.items())
        check(
            sum(given.values()) <= 1 + 1e-9,
            f"{words} are more than 1, the whole batch; what they leave are jumps between any two "
            "times. Lower some",
        )
        check(0 <= self.power <= 1, f"objective.power={self.power} must be between 0 and 1")

    def shares(self) -> dict[str, float]:
        """The share of every kind; they sum to 1."""
        given = {name: getattr(self, f"share_{name}") for name in KINDS if name != "change"}
        rest = 1 - sum(given.values())
        given["change"] = rest if rest > 1e-9 else 0.0
        return {name: given[name] for name in KINDS}

    def calls(self) -> Calls:
        return Calls(weights=1, plain=self.share_consistency)

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """It takes no derivative. Two stored states make a straight line."""


@dataclass
class TraFlowConfig(DrawnConfig):
    """TraFlow: the teacher's output, its change and self-consistency, drawn on its curve."""

    name: str = "traflow"


@dataclass
class BezierConfig(DrawnConfig):
    """Bezier distillation: TraFlow's drawn targets on the mixed curve of several teachers."""

    name: str = "bezier"


@dataclass
class SummedConfig(ObjectiveConfig):
    """TraFlow as a sum of terms: output, states on the sampler's jumps, velocity.

    Self-consistency and a flow-matching anchor are there, and off: they cost more than they gain
    (docs/log.md).
    """

    middle: ClassVar[float] = DRILLED

    name: str = "traflow_summed"
    weight_output: float = 1.0  # of one jump to the teacher's output; 0 leaves a term out
    weight_states: float = 0.5  # of jumps between the teacher's states
    weight_velocity: float = 0.15  # of the change of a jump with its end
    weight_consistency: float = 0.0  # of one jump against two
    weight_flow_matching: float = 0.0  # of s = t, plain flow matching
    weights: str = "fixed"  # fixed | adaptive (by the gradient's norm, relative to the first term)
    sampler_nfe: list[int] = field(
        default_factory=lambda: [2, 4, 4, 8]
    )  # jumps of the states and velocity terms: those of samplers with so many steps; []: any
    velocity_mode: str = "trajectory"  # straight | trajectory
    derivative: str = "finite_difference"  # jvp | finite_difference

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective.weights", self.weights, ("fixed", "adaptive"))
        check_choice("objective.velocity_mode", self.velocity_mode, ("straight", "trajectory"))
        check_choice("objective.derivative", self.derivative, ("jvp", "finite_difference"))
        check_weights(
            output=self.weight_output,
            states=self.weight_states,
            velocity=self.weight_velocity,
            consistency=self.weight_consistency,
            flow_matching=self.weight_flow_matching,
        )
        check(
            all(n > 0 for n in self.sampler_nfe),
            f"objective.sampler_nfe={self.sampler_nfe} must be above 0",
        )

    def calls(self) -> Calls:
        # Adaptive weights go back through the target once more than the step does.
        again = Calls(passes=1) if self.weights == "adaptive" else Calls()
        return counted(
            (self.weight_output, ONE),
            (self.weight_states, ONE),
            (self.weight_velocity, self._velocity_calls()),
            (self.weight_consistency, CONSISTENCY + again),
            (self.weight_flow_matching, ONE),
        )

    def _velocity_calls(self) -> Calls:
        """Those of the velocity term alone. It shares the jump of the states term where it can."""
        is_shared = self.weight_states > 0 and self.velocity_mode == "trajectory"
        slope = ONE if self.derivative == "finite_difference" else Calls(tangents=1)
        return slope if is_shared else ONE + slope

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """The sampler's jumps go between stored states. A difference over one survives 16 bits."""
        for nfe in self.sampler_nfe:
            times = sampler_times(nfe, self.middle)
            visited = {time * grid for time in times}
            check(
                visited <= set(points),
                f"objective.sampler_nfe={self.sampler_nfe}: {nfe} jumps go through t = "
                f"{times}, and not all of these states are stored; choose another "
                f"trajectory.grid={grid}, keep those points in trajectory.store_points, or leave "
                f"{nfe} out of objective.sampler_nfe",
            )


@dataclass
class GuidesConfig(ObjectiveConfig):
    """One Bezier curve from noise to data: teachers' outputs or states as control points.

    Degree 1 of a path is the line to the teachers' mean output: it helped most (docs/method.md).
    """

    middle: ClassVar[float] = DRILLED

    name: str = "bezier_guides"
    variant: str = "path"  # endpoint | path | straight
    degree: int = 1  # of `path`; that of `endpoint` is the number of teachers, of `straight` 1
    weight_drift: float = 0.0  # of the curve's velocity at s = t; 0 leaves a term out
    weight_map: float = 1.0  # of jumps along the curve
    weight_end: float = 1.0  # of jumps to its end
    p_full: float = 0.5  # share of these that are the whole way, noise to end
    derivative: str = "finite_difference"  # jvp | finite_difference

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective.variant", self.variant, ("endpoint", "path", "straight"))
        check_choice("objective.derivative", self.derivative, ("jvp", "finite_difference"))
        check_positive("objective", degree=self.degree)
        check_weights(drift=self.weight_drift, map=self.weight_map, end=self.weight_end)
        check_share(p_full=self.p_full)

    def calls(self) -> Calls:
        return counted(
            (self.weight_drift, ONE),
            (self.weight_map, EULERIAN[self.derivative]),
            (self.weight_end, ONE),
        )

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """A path of degree n is fitted through n - 1 states between its ends."""
        if self.weight_map > 0:
            check_eulerian(self.name, self.derivative, train)
        check(
            self.variant != "path" or len(points) - 2 >= self.degree - 1,
            f"objective.degree={self.degree} of a path needs {self.degree - 1} stored states "
            f"between the ends, not {len(points) - 2}; raise trajectory.grid={grid}, keep more "
            "points in trajectory.store_points, or lower the degree",
        )


@dataclass
class EndpointConfig(ObjectiveConfig):
    """Rectified-flow distillation: one jump from noise to the teacher's output."""

    name: str = "endpoint"

    def calls(self) -> Calls:
        return ONE

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """It takes no derivative and two stored states are enough."""


@dataclass
class ReflowConfig(ObjectiveConfig):
    """k-rectified flow: velocity regression on pairs; on (noise, image) pairs, pre-training."""

    name: str = "reflow"
    distance: str = "l2"
    times: str = "uniform"  # uniform | u_shaped

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective.times", self.times, ("uniform", "u_shaped"))

    def calls(self) -> Calls:
        return ONE

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """It takes no derivative and two stored states are enough."""


@dataclass
class ConsistencyConfig(ObjectiveConfig):
    """Consistency trajectory model without the adversarial term (Kim et al., 2024)."""

    name: str = "consistency"

    def calls(self) -> Calls:
        return CONSISTENCY

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """It takes no derivative and two stored states are enough."""


@dataclass
class MeanFlowConfig(ObjectiveConfig):
    """MeanFlow: the Eulerian flow-map identity (Geng et al., 2025), with the settings of its
    ImageNet-256: s = t for three quarters (their Table 1a: r is not t for 25 %), logit-normal times
    of mean -0.4 where 1 is noise, p = 1 of the adaptive weight. Their CIFAR-10 has other ones.

    On the teacher's own curve it is Align Your Flow's Eulerian distillation (configs/objective/
    ayf.yaml).
    """

    name: str = "meanflow"
    distance: str = "l2"
    path: str = "straight"  # straight (the pairs) | curve (the teacher's)
    # logit_normal, uniform: two sorted times; after: t uniform, s uniform in [t, 1)
    times: str = since("0.3", "logit_normal", before="after")
    logit_mean: float = 0.4  # of logit_normal times; above 0 is nearer to data
    logit_std: float = 1.0  # of the same
    p_diagonal: float = 0.75  # chance of s = t, plain flow matching
    # p of the weight 1 / (|e|^2 + c)^p of an error e, held fixed; 0 is off
    adaptive_power: float = since("0.3", 1.0, before=0.0)
    adaptive_floor: float = 1e-3  # c
    derivative: str = "finite_difference"  # jvp | finite_difference

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective.path", self.path, ("straight", "curve"))
        check_choice("objective.times", self.times, ("logit_normal", "uniform", "after"))
        check_choice("objective.derivative", self.derivative, ("jvp", "finite_difference"))
        check_share(p_diagonal=self.p_diagonal)
        check_positive("objective", logit_std=self.logit_std, adaptive_floor=self.adaptive_floor)
        check(
            self.adaptive_power >= 0,
            f"objective.adaptive_power={self.adaptive_power} must not be below 0; 0 is off",
        )

    def calls(self) -> Calls:
        return EULERIAN[self.derivative]

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """Two stored states are enough."""
        check_eulerian(self.name, self.derivative, train)


@dataclass
class LagrangianConfig(ObjectiveConfig):
    """Lagrangian map distillation (Boffi et al., 2025): the derivative of a jump by its end is the
    velocity there. Their share of s = t, and times uniform over t <= s.
    """

    name: str = "lagrangian"
    distance: str = "l2"
    share_diagonal: float = 0.75  # of s = t, plain flow matching
    derivative: str = "finite_difference"  # jvp (held fixed) | finite_difference (with gradient)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective.derivative", self.derivative, ("jvp", "finite_difference"))
        check_share(share_diagonal=self.share_diagonal)

    def calls(self) -> Calls:
        rest = 1 - self.share_diagonal
        by_difference = self.derivative == "finite_difference"
        return ONE + (Calls(weights=rest) if by_difference else Calls(tangents=rest))

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """Two stored states make a straight line."""
        if self.share_diagonal < 1:
            check_eulerian(self.name, self.derivative, train)


@dataclass
class ShortcutConfig(ObjectiveConfig):
    """Shortcut models (Frans et al., 2024): two half jumps of the average are the target of a whole
    one. Their share of flow matching, and their 128 shortest steps.
    """

    name: str = "shortcut"
    distance: str = "l2"
    path: str = "straight"  # straight (the pairs) | curve (the teacher's)
    share_diagonal: float = 0.75  # of s = t, plain flow matching
    shortest: int = 128  # half jumps from 0 to 1, of the shortest kind; a power of 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective.path", self.path, ("straight", "curve"))
        check_share(share_diagonal=self.share_diagonal)
        check_power_of_two("shortest", self.shortest, 2)

    def calls(self) -> Calls:
        return Calls(weights=1, plain=2 * (1 - self.share_diagonal))

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """It takes no derivative. Two stored states make a straight line."""


@dataclass
class ProgressiveConfig(ObjectiveConfig):
    """Progressive distillation (Salimans and Ho, 2022): jumps of twice the length in every phase of
    the training, all phases equally long, down to one jump.
    """

    name: str = "progressive"
    distance: str = "l2"
    jumps: int = 4  # from 0 to 1 in the first phase; a power of 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power_of_two("jumps", self.jumps, 1)

    def calls(self) -> Calls:
        return ONE

    def check_run(self, train: TrainConfig, grid: int, points: list[int]) -> None:
        """It takes no derivative. Two stored states make a straight line."""


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "traflow": TraFlowConfig,
    "traflow_summed": SummedConfig,
    "bezier": BezierConfig,
    "bezier_guides": GuidesConfig,
    "endpoint": EndpointConfig,
    "reflow": ReflowConfig,
    "consistency": ConsistencyConfig,
    "meanflow": MeanFlowConfig,
    "lagrangian": LagrangianConfig,
    "shortcut": ShortcutConfig,
    "progressive": ProgressiveConfig,
}

# Objectives that version 0.1 called otherwise, by its name and a setting that only they have
EARLIER = {("traflow", "weight_output"): "traflow_summed", ("bezier", "variant"): "bezier_guides"}


def name_now(stored: Any) -> str:
    """What an objective is called now, from its settings as a run has stored them."""
    for (name, setting), now in EARLIER.items():
        if stored["name"] == name and setting in stored:
            return now
    return stored["name"]
