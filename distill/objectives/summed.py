"""TraFlow as a sum of terms, with the velocity as a derivative (docs/method.md).

    L = w_out L_out + w_sta L_sta + w_vel L_vel + w_con L_con + w_fm L_fm

    L_out = D( G(X_0, 0, 1), X_K )                        the teacher's output
    L_sta = D( G(X_a, t_a, t_b), X_b )                    its states, jump by jump of the sampler
    L_vel = D( dG(x_t, t, s)/ds, its change at s )        its velocity
    L_con = self-consistency along the trajectory         see `consistency_term`
    L_fm  = D( u(x_t, t, t), x_1 - x_0 )                  an anchor on the diagonal

G(x, t, s) = x + (s - t) u(x, t, s). X_0 .. X_K are the best teacher's states on the stored grid.
A term of weight 0 is not computed. SCoT, a later version of the paper, is a configuration of this
(configs/objective/scot.yaml).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.conditions.condition import Condition
from distill.config import ConfigError
from distill.flow.paths import MeanVelocity, expand_as, interpolate
from distill.flow.times import DRILLED, sampler_times
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base, consistency, derivatives, endpoint, reflow
from distill.objectives.config import SummedConfig

ADAPTIVE_RANGE = (0.01, 10.0)  # of the ratio of gradient norms, as SCoT clips it


class Summed:
    """Output, states, velocity and self-consistency targets; those of weight 0 are not computed."""

    def __init__(
        self,
        config: SummedConfig,
        distances: base.Distances,
        seed: int,
        gradient_norms: base.GradientNorms | None = None,
    ) -> None:
        """`gradient_norms` is what adaptive weights need, and only they."""
        self.config, self.distances, self.seed = config, distances, seed
        self.gradient_norms = gradient_norms

    def loss(
        self, batch: TrajectoryBatch, student: MeanVelocity, target: MeanVelocity, step: int
    ) -> base.LossTerms:
        config, seed, of_states = self.config, self.seed, self.distances.states
        terms = {}
        if config.weight_output > 0:
            terms["output"] = endpoint.output_term(batch, of_states, config.weight_output)
        if config.weight_states > 0 or config.weight_velocity > 0:
            a, b = draw_jump(batch.times, config.sampler_nfe, seed, step, batch)
            jump = base.Call(base.pick(batch.best, a), batch.times[a], batch.times[b])
            terms |= self.jump_terms(batch, student, jump, b)
        if config.weight_consistency > 0:
            weight = config.weight_consistency
            terms["consistency"] = consistency.consistency_term(
                batch, target, seed, step, of_states, weight
            )
        if config.weight_flow_matching > 0:
            t, weight = base.draw(seed, "flow_matching/t", step, batch), config.weight_flow_matching
            terms["flow_matching"] = reflow.flow_matching_term(
                batch, t, self.distances.velocities, weight
            )
        result = base.loss_terms(terms, student, batch.condition)
        if config.weights == "adaptive":
            assert self.gradient_norms is not None
            return balanced(result, self.gradient_norms)
        return result

    def jump_terms(
        self, batch: TrajectoryBatch, student: MeanVelocity, jump: base.Call, b: Int[Tensor, "B"]
    ) -> dict[str, base.Term]:
        """The states and velocity terms: they share one jump, from X_a to the time of X_b."""
        config, terms = self.config, {}
        if config.weight_states > 0:
            landing, distance = base.pick(batch.best, b), self.distances.states
            terms["states"] = states_term(jump, landing, distance, config.weight_states)
        if config.weight_velocity > 0:
            terms["velocity"] = self.velocity_term(batch, student, jump, b)
        return terms

    def velocity_term(
        self, batch: TrajectoryBatch, student: MeanVelocity, jump: base.Call, b: Int[Tensor, "B"]
    ) -> base.Term:
        """L_vel where `jump` lands: t = t_a, s = t_b.

        trajectory: x_t = X_a, against the teacher's own change at s. `jump` is the evaluation that
                    the states term needs too.
        straight:   x_t = (1 - t) x_0 + t x_1, against x_1 - x_0. It agrees with the flow map of
                    the reflowed model, and with the teacher's only where its paths are straight.
        """
        config = self.config
        distance, weight = self.distances.velocities, config.weight_velocity
        by_difference = config.derivative == "finite_difference"
        if config.velocity_mode == "straight":
            x_0, x_1 = batch.noise, batch.best[:, -1]
            jump, slope = base.Call(interpolate(x_0, x_1, jump.t), jump.t, jump.s), x_1 - x_0
        else:
            slope = last_change(batch, b) if by_difference else state_derivative(batch, b)
        if by_difference:
            return finite_change_term(jump, batch.times[b - 1], slope, distance, weight)
        return jvp_term(jump, slope, student, batch.condition, distance, weight)


# -----------------------------------------------------------------------------------------------
# The states between


def draw_jump(
    times: Float[Tensor, "K1"], nfe: list[int], seed: int, step: int, batch: TrajectoryBatch
) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """Grid indices a < b of a jump of `sampler_times(N)`, N uniform in `nfe`.

    The jump is the one that holds a uniform time, so a long one is drawn more often.
    With an empty `nfe`, any a < b of the grid: a uniform in 0 .. K-1, b in a+1 .. K.

    Raises:
        ConfigError: the grid does not hold a time that the sampler visits.
    """
    u, w = base.draw(seed, "states/a", step, batch), base.draw(seed, "states/b", step, batch)
    if not nfe:
        last = len(times) - 1
        a = base.draw_index(u, 0, last - 1)
        return a, base.draw_index(w, a + 1, last)
    visited = torch.full((len(nfe), max(nfe) + 1), 1.0, dtype=times.dtype)
    for row, n in zip(visited, nfe, strict=True):
        row[: n + 1] = torch.tensor(sampler_times(n, DRILLED))
    visited = visited.to(times.device)
    gaps = (visited[:, :, None] - times).abs()
    if bool((gaps.min(dim=2).values > 1e-6).any()):
        raise ConfigError(
            f"objective.sampler_nfe={nfe} visits times that are not stored; trajectory.grid must "
            "hold the times of each of them"
        )
    index, level = gaps.argmin(dim=2), base.draw_index(u, 0, len(nfe) - 1)
    place = (visited[level] <= w[:, None]).sum(dim=1) - 1
    return index[level, place], index[level, place + 1]


def states_term(
    jump: base.Call, landing: Float[Tensor, "B *S"], distance: base.Distance, weight: float
) -> base.Term:
    """D( G(X_a, t_a, t_b), X_b ) for the jump from X_a, with `landing` the teacher's X_b."""
    return base.Term(weight, [jump], lambda u: distance(jump.landing(u), landing))


# -----------------------------------------------------------------------------------------------
# The velocity, in two forms


def last_change(batch: TrajectoryBatch, b: Int[Tensor, "B"]) -> Float[Tensor, "B *S"]:
    """(X_b - X_{b-1}) / (t_b - t_{b-1})."""
    rise = base.pick(batch.best, b) - base.pick(batch.best, b - 1)
    return rise / expand_as(batch.times[b] - batch.times[b - 1], rise)


def state_derivative(batch: TrajectoryBatch, b: Int[Tensor, "B"]) -> Float[Tensor, "B *S"]:
    """dX/dt at t_b from the parabola through the three nearest states; error of order h^2.

    On an even grid, between the ends: (X_{b+1} - X_{b-1}) / (t_{b+1} - t_{b-1}).
    """
    times = batch.times
    middle = b.clamp(1, max(len(times) - 2, 1))
    if len(times) == 2:
        return last_change(batch, torch.ones_like(b))
    nodes = [middle - 1, middle, middle + 1]
    total = torch.zeros_like(batch.noise)
    for i in range(3):  # derivative of Lagrange's polynomials at t_b
        j, k = (n for n in range(3) if n != i)
        t_i, t_j, t_k = times[nodes[i]], times[nodes[j]], times[nodes[k]]
        slope = (2 * times[b] - t_j - t_k) / ((t_i - t_j) * (t_i - t_k))
        total = total + expand_as(slope, total) * base.pick(batch.best, nodes[i])
    return total


def finite_change_term(
    jump: base.Call,
    before: Float[Tensor, "B"],
    slope: Float[Tensor, "B *S"],
    distance: base.Distance,
    weight: float,
) -> base.Term:
    """D( (G(x_t, t, s) - G(x_t, t, s - h)) / h, slope ), gradient through both jumps.

    `before` = s - h is a stored time, so with the teacher's change as slope it is exact.
    """
    short = base.Call(jump.x, jump.t, before)

    def value(u: Float[Tensor, "B *S"], u_short: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
        rise = jump.landing(u) - short.landing(u_short)
        return distance(rise / expand_as(jump.s - before, rise), slope)

    return base.Term(weight, [jump, short], value)


def jvp_term(
    jump: base.Call,
    slope: Float[Tensor, "B *S"],
    student: MeanVelocity,
    condition: Condition,
    distance: base.Distance,
    weight: float,
) -> base.Term:
    """D( u, slope - (s - t) sg[du/ds] ), since dG/ds = u + (s - t) du/ds. The stable form."""

    def value(u: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
        du_ds = derivatives.time_derivative(student, jump.x, jump.t, jump.s, condition)
        return distance(u, slope - expand_as(jump.s - jump.t, u) * du_ds)

    return base.Term(weight, [jump], value)


# -----------------------------------------------------------------------------------------------
# Weights


def balanced(result: base.LossTerms, gradient_norms: base.GradientNorms) -> base.LossTerms:
    """Each weight w_k times |grad L_1| / |grad L_k| at the last layer, clipped; L_1 the first term.

    So every term pulls as hard as the first (VQ-GAN, Esser et al. 2021; CTM; SCoT). The norms are
    those of the loss averaged over ranks, so the weights are the same on all of them.
    """
    norms = gradient_norms(list(result.terms.values()))
    ratios = (norms[0] / norms.clamp_min(1e-12)).clamp(*ADAPTIVE_RANGE)
    weights = zip(result.weights.items(), ratios, strict=True)
    return base.LossTerms({name: weight * ratio for (name, weight), ratio in weights}, result.terms)
