"""Targets drawn on a curve: every sample of a batch is asked one question about the mean change.

    L = mean_i D( (w - t)^p u(x, t, w), (w - t)^p c ),   x = X(t),  t <= w

X is the curve of `distill.flow.curve`, u the student. A sample draws one kind of target, with its
share as chance, and the times of one jump: uniform ones, sorted where there are several.

    kind          jump      c                                                 what it teaches
    output        0 -> 1    (X(1) - X(0)) / 1                                 the output
    start         0 -> s    (X(s) - X(0)) / s                                 the first jump of many
    end           t -> 1    (X(1) - X(t)) / (1 - t),  t uniform               the last one
    change        t -> s    (X(s) - X(t)) / (s - t);  dX/dt at s = t          the amount of change
    consistency   t -> w    (X(s) + (w - s) u'(X(s), s, w) - X(t)) / (w - t)  self-consistency

u' is the average of the student: its jump s -> w must end where the student's own t -> w does, if
the teacher goes from X(t) to X(s). So one evaluation of the student and a share of one of the
average is all that a sample costs; no derivative is taken, and every jump is trained.

p lies between the regression of velocities (0), in which short jumps count as much as long ones,
and of landings (1), in which they count nothing.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.conditions.condition import Condition
from distill.flow.curve import Curve
from distill.flow.paths import MeanVelocity, expand_as, jump
from distill.flow.trajectory import TrajectoryBatch
from distill.objectives import base
from distill.objectives.config import KINDS, DrawnConfig

SHORTEST = 1e-4  # of a jump whose change is a difference; below it is dX/dt


def drawn_terms(
    config: DrawnConfig,
    distances: base.Distances,
    seed: int,
    curve: Curve,
    batch: TrajectoryBatch,
    student: MeanVelocity,
    target: MeanVelocity,
    step: int,
) -> base.LossTerms:
    """The loss, a term for every kind that is drawn: its mean over the samples that drew it, and
    its share as weight.
    """
    shares = config.shares()
    kind = draw_kind(list(shares.values()), seed, step, batch)
    t, s, w = draw_times(kind, seed, step, batch)
    x, slope = curve.at(t)
    goal, _ = curve.at(s)
    if shares["consistency"] > 0:
        by_average = kind == KINDS.index("consistency")
        goal = carried_on(goal, s, w, by_average, target, batch.condition)
    gap = expand_as(w - t, x)
    change = torch.where(gap > SHORTEST, (goal - x) / gap.clamp_min(SHORTEST), slope)
    u = student(x, t, w, batch.condition)
    off = distances.jumps(base.Call(x, t, w), u, change, config.power)
    # Over the expected number of samples, so that the whole is the mean over the batch.
    terms = {
        name: (off * (kind == index)).mean() / shares[name]
        for index, name in enumerate(KINDS)
        if shares[name] > 0
    }
    return base.LossTerms({name: shares[name] for name in terms}, terms)


def draw_kind(
    shares: list[float], seed: int, step: int, batch: TrajectoryBatch
) -> Int[Tensor, "B"]:
    """The kind of each sample; of a global batch every kind gets its share, up to one sample."""
    edges = torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1].to(batch.times)
    return torch.searchsorted(edges, base.draw_strata(seed, "drawn/kind", step, batch), right=True)


def draw_times(
    kind: Int[Tensor, "B"], seed: int, step: int, batch: TrajectoryBatch
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]]:
    """t, s and w: the jump is t -> w, and the teacher's state at s is known; s = w but for
    `consistency`.
    """
    first, second, third = (base.draw(seed, f"drawn/{name}", step, batch) for name in "tsw")
    zero, one = torch.zeros_like(first), torch.ones_like(first)
    two = torch.stack([first, second]).sort(dim=0).values
    three = torch.stack([first, second, third]).sort(dim=0).values
    output, start, end, _, consistency = (kind == index for index in range(len(KINDS)))
    t = torch.where(consistency, three[0], torch.where(end, first, two[0]))
    t = torch.where(output | start, zero, t)
    s = torch.where(consistency, three[1], torch.where(start, second, two[1]))
    s = torch.where(output | end, one, s)
    return t, s, torch.where(consistency, three[2], s)


@torch.no_grad()
def carried_on(
    x: Float[Tensor, "B *S"],
    s: Float[Tensor, "B"],
    w: Float[Tensor, "B"],
    which: Bool[Tensor, "B"],
    target: MeanVelocity,
    condition: Condition,
) -> Float[Tensor, "B *S"]:
    """`x` at s; where `which` says so, carried on to w by a jump of the average.

    The average is called on these samples alone, and on one at least: it may be in parts on all
    ranks, which must call it equally often.
    """
    rows = which.nonzero()[:, 0]
    taken = rows if len(rows) else torch.zeros_like(s[:1], dtype=torch.int64)
    landed = jump(target, x[taken], s[taken], w[taken], condition[taken])
    return x.index_copy(0, rows, landed[: len(rows)])
