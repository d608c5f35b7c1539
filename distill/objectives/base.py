"""What an objective is, and the parts that all are made of.

    L = sum_k w_k mean_i D_k(i)

An objective is a few terms D_k. A term says which evaluations of the student it needs, and what it
is for sample i once they are made. So those of all terms go through the network as one batch, and
one that two terms share is made once. Random times are drawn by place in the global batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from distill.conditions.condition import Condition
from distill.flow.curve import curve_through
from distill.flow.noise import permutation, uniform
from distill.flow.paths import MeanVelocity, expand_as, interpolate
from distill.flow.trajectory import TrajectoryBatch

# D(a, b) per sample
Distance = Callable[[Float[Tensor, "B *S"], Float[Tensor, "B *S"]], Float[Tensor, "B"]]
# N losses -> |d loss / d w| of each for the last layer's weight w, averaged over ranks
GradientNorms = Callable[[list[Tensor]], Float[Tensor, "N"]]

# -----------------------------------------------------------------------------------------------
# An objective


@dataclass
class LossTerms:
    """The result of an objective.

    Attributes:
        weights: what each term counts, by name; a number, or a scalar without gradient.
        terms: every term that was computed, a scalar mean over the batch, with gradient.
    """

    weights: dict[str, float | Float[Tensor, ""]]
    terms: dict[str, Float[Tensor, ""]]

    @property
    def total(self) -> Float[Tensor, ""]:
        """L = sum_k weights[k] terms[k]."""
        return torch.stack([self.weights[name] * term for name, term in self.terms.items()]).sum()


@runtime_checkable
class Objective(Protocol):
    """A distillation loss on teacher trajectories."""

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> LossTerms:
        """The loss on this rank's part of a global batch, a mean over its samples.

        `student` carries gradient to its weights; `target`, its moving average, to its input only.
        """


# -----------------------------------------------------------------------------------------------
# Terms, and the evaluations of the student that they share


@dataclass(frozen=True)
class Call:
    """An evaluation u(x, t, s) of the student, with gradient to its weights."""

    x: Float[Tensor, "B *S"]
    t: Float[Tensor, "B"]
    s: Float[Tensor, "B"]

    def landing(self, u: Float[Tensor, "B *S"]) -> Float[Tensor, "B *S"]:
        """G(x, t, s) = x + (s - t) u, for `u` the result of this call."""
        return self.x + expand_as(self.s - self.t, self.x) * u


@dataclass(frozen=True)
class Distances:
    """D of an objective: between states of a path, which are images, and between velocities.

    Both are in one scale, so that their terms can be weighed.
    """

    states: Distance
    velocities: Distance

    def jumps(
        self, call: Call, u: Float[Tensor, "B *S"], change: Float[Tensor, "B *S"], power: float
    ) -> Float[Tensor, "B"]:
        """D( (s - t)^p u, (s - t)^p change ) of jumps from t to s, for u the result of `call`.

        Where D looks at images, jumps to t = 1 are compared by where they land, with the same
        power of their length: D( x + (s - t) u, x + (s - t) change ) (s - t)^(p - 1).
        """
        gap = call.s - call.t
        scale = expand_as(gap**power, u)
        off = self.velocities(scale * u, scale * change)
        if self.states is self.velocities:
            return off
        rows = ((call.s == 1) & (gap > 0)).nonzero()[:, 0]
        if len(rows) == 0:
            return off
        landed, goal = call.landing(u)[rows], call.landing(change)[rows]
        images = self.states(landed, goal) * gap[rows] ** (power - 1)
        return off.index_copy(0, rows, images.to(off))


@dataclass(frozen=True)
class Term:
    """A part of a loss.

    Attributes:
        weight: what it counts.
        calls: evaluations of the student.
        value: value per sample, from the results of `calls`, in their order.
    """

    weight: float
    calls: list[Call]
    value: Callable[..., Float[Tensor, "B"]]


def loss_terms(terms: dict[str, Term], student: MeanVelocity, condition: Condition) -> LossTerms:
    """Means over the batch of all terms, from one evaluation of the student.

    A call that several terms share, the same object in each, is made once.
    """
    calls = list({id(call): call for term in terms.values() for call in term.calls}.values())
    x = torch.cat([call.x for call in calls])
    t, s = torch.cat([call.t for call in calls]), torch.cat([call.s for call in calls])
    parts = student(x, t, s, condition.repeat(len(calls))).chunk(len(calls))
    results = {id(call): part for call, part in zip(calls, parts, strict=True)}
    values = {n: term.value(*[results[id(c)] for c in term.calls]) for n, term in terms.items()}
    return LossTerms(
        {name: term.weight for name, term in terms.items()},
        {name: value.mean() for name, value in values.items()},
    )


# -----------------------------------------------------------------------------------------------
# Random draws, by position in the global batch


def draw(seed: int, purpose: str, step: int, batch: TrajectoryBatch) -> Float[Tensor, "B"]:
    """Uniform numbers in [0, 1), one per sample, in the dtype of the batch's times.

    A pure function of (seed, purpose, step, position in the global batch): the same on any number
    of ranks and for any split into micro-batches.
    """
    return _of_batch(uniform(seed, f"objective/{purpose}", step, batch.global_size), batch)


def draw_strata(seed: int, purpose: str, step: int, batch: TrajectoryBatch) -> Float[Tensor, "B"]:
    """As `draw`, and of a global batch of n there is one in each [k/n, (k + 1)/n)."""
    purpose, n = f"objective/{purpose}", batch.global_size
    order = permutation(seed, f"{purpose}/order", step, n)
    return _of_batch((order + uniform(seed, purpose, step, n)) / n, batch)


def _of_batch(whole: NDArray[np.float64], batch: TrajectoryBatch) -> Float[Tensor, "B"]:
    """This rank's part of the draws of a global batch."""
    # Rounding to float32 can reach 1.0, which is outside the range.
    return torch.from_numpy(whole).to(batch.times).clamp(max=1 - 2**-24)[batch.positions]


def draw_index(
    u: Float[Tensor, "B"], low: int | Int[Tensor, "B"], high: int | Int[Tensor, "B"]
) -> Int[Tensor, "B"]:
    """Whole numbers low .. high, both included, from uniform `u`."""
    span = torch.as_tensor(high - low + 1, device=u.device)
    return low + (u * span).long().minimum(span - 1)


def pick(states: Float[Tensor, "B K1 *S"], index: Int[Tensor, "B"]) -> Float[Tensor, "B *S"]:
    """states[i, index[i]] for every sample i."""
    return states[torch.arange(len(states), device=states.device), index]


def on_path(
    path: str, batch: TrajectoryBatch, t: Float[Tensor, "B"]
) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"]]:
    """x and dx/dt at t: "straight", x_t = (1 - t) x_0 + t X_K of the pair, or on the "curve" of the
    last, best teacher.
    """
    if path == "straight":
        x_0, x_1 = batch.noise, batch.best[:, -1]
        return interpolate(x_0, x_1, t), x_1 - x_0
    return curve_through(batch.best, batch.times, batch.best_velocities).at(t)


def by_share(
    off: Float[Tensor, "B"], parts: dict[str, tuple[float, Bool[Tensor, "B"]]]
) -> LossTerms:
    """Terms of losses per sample: each part (share, samples) is the mean over its samples, weighted
    by its share; one of share 0 is left out.
    """
    # Over the expected number of samples, so that the whole is the mean over the batch.
    terms = {n: (off * here).mean() / share for n, (share, here) in parts.items() if share > 0}
    return LossTerms({name: parts[name][0] for name in terms}, terms)
