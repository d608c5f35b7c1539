"""The work of an objective: network forwards of one training sample, counted without running it."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from distill.objectives.config import (
    BezierConfig,
    ConsistencyConfig,
    MeanFlowConfig,
    ObjectiveConfig,
    TraFlowConfig,
)


@dataclass(frozen=True)
class Calls:
    """Network calls of one training sample: with gradient to the weights, without, with gradient
    to the input, and forward-mode derivatives (a value and its tangent, two forwards).

    `passes` are no calls: adaptive weights go back through a call once more, for the gradient of
    its term at the last layer.
    """

    weights: int = 0
    plain: int = 0
    inputs: int = 0
    tangents: int = 0
    passes: int = 0

    @property
    def forwards(self) -> int:
        """All of them, in forwards."""
        return self.weights + self.plain + self.inputs + 2 * self.tangents

    @property
    def in_forwards(self) -> int:
        """Work in units of one forward: a backward pass costs one for the inputs and one for the
        weights.
        """
        once = self.plain + self.passes
        return 3 * self.weights + once + 2 * self.inputs + 2 * self.tangents

    def __add__(self, other: Calls) -> Calls:
        return Calls(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


ONE, CONSISTENCY = Calls(1), Calls(1, plain=2, inputs=1)
EULERIAN = {"finite_difference": Calls(1, plain=1), "jvp": Calls(1, tangents=1)}


def objective_calls(objective: ObjectiveConfig) -> Calls:
    """Network forwards of the objective on one sample. A term of weight 0 is not computed."""
    match objective:
        case TraFlowConfig():
            again = Calls(passes=1) if objective.weights == "adaptive" else Calls()
            weighted = [
                (objective.weight_output, ONE),
                (objective.weight_states, ONE),
                (objective.weight_velocity, velocity_calls(objective)),
                (objective.weight_consistency, CONSISTENCY + again),
                (objective.weight_flow_matching, ONE),
            ]
        case BezierConfig():
            weighted = [
                (objective.weight_drift, ONE),
                (objective.weight_map, EULERIAN[objective.derivative]),
                (objective.weight_end, ONE),
            ]
        case MeanFlowConfig():
            return EULERIAN[objective.derivative]
        case ConsistencyConfig():
            return CONSISTENCY
        case _:
            return ONE
    return sum((calls for weight, calls in weighted if weight > 0), Calls())


def velocity_calls(objective: TraFlowConfig) -> Calls:
    """Those of the velocity term alone. It shares the jump of the states term where it can."""
    is_shared = objective.weight_states > 0 and objective.velocity_mode == "trajectory"
    jump = Calls() if is_shared else ONE
    match objective.derivative:
        case "finite_difference":
            return jump + ONE
        case "jvp":
            return jump + Calls(tangents=1)
        case _:  # forward, back, and back through both: about three evaluations with gradient
            return Calls(3, passes=int(objective.weights == "adaptive"))
