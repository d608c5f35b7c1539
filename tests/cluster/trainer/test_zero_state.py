"""ZeRO's norm, moments, weights and averages after every step are those of plain PyTorch.

The reference is mixed precision as a book has it: float32 masters; a copy of them in 16 bits for
forward and backward; the gradients of every rank's every micro-batch cast to float32 and averaged
there; AdamW and averages in float32. DeepSpeed adds gradients up over ranks and micro-batches in
the working precision. So one rounding of it, `ROUNDING`, is what the tolerances count in.
"""

from functools import cache
from itertools import chain, pairwise

import pytest
import torch
from small_training import (
    allow_fp16,
    config_of,
    moved_network,
    read_share,
    without_key_bias,
    zero_engine,
)
from torch import Tensor

from distill.config import TrainConfig
from distill.objectives.build import build_objective
from distill.objectives.config import ConsistencyConfig
from distill.testing import run_ranks

STEPS, RANKS, LR = 3, 2, 2e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# In float32 what comes of adding in another order.
ROUNDING = {"fp32": 5e-7, "bf16": 2**-7, "fp16": 2**-10}
# Of the weights' way from the start. Adam divides by its moments: where a gradient is rounding, so
# is the step. What it makes of the engine's own moments is tested by itself, and exactly.
WAY = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.1}
# A power of two, which changes no bit: DeepSpeed's may be another. It keeps gradients in fp16.
SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 2.0**10}
MOMENTS, AVERAGES = ("exp_avg", "exp_avg_sq"), ("ema/target", "ema/evaluation")

# (precision, accumulated); with clipping, which the moments would not feel, where it is not.
RUNS = [("fp32", False), ("bf16", False), ("bf16", True), ("fp16", True)]
# Stage 3 last: it replaces F.linear for the whole process.
CASES = [(stage, *run) for stage in range(4) for run in RUNS]
State = dict[tuple[str, str], Tensor]  # by (kind, name), flattened


def settings(precision: str, accumulated: bool, stage: int = 1) -> TrainConfig:
    how = {"micro_batch": 2, "grad_clip": 0.0} if accumulated else {"grad_clip": 0.5}
    return config_of(precision=precision, zero_stage=stage, ema_target=0.15, **how)


def decay_of(kind: str, step: int, config: TrainConfig) -> float:
    """The ramp (1 + k) / (10 + k), up to the setting. At 0.15 `ema_target` ends it at step 1."""
    end = config.ema_target if kind == "ema/target" else config.ema_evaluation
    return min(end, (1 + step) / (10 + step))


class MixedPrecision:
    """The reference, for the shares of `RANKS` ranks."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.dtype = config, DTYPES[config.precision]
        trained = moved_network().named_parameters()
        self.masters = {name: p for name, p in trained if p.requires_grad}
        self.decays = {n: config.weight_decay * (p.ndim > 1) for n, p in self.masters.items()}
        self.moments = {
            (kind, name): torch.zeros_like(p)
            for kind in MOMENTS
            for name, p in self.masters.items()
        }
        self.averages = {
            kind: {name: p.detach().clone() for name, p in self.masters.items()}
            for kind in AVERAGES
        }

    def network(self, weights: dict[str, Tensor]):
        """The network with `weights` in 16 bits, as the objective calls it, and those weights."""
        built = moved_network().to(self.dtype)
        params = {name: p for name, p in built.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(weights[name])
        return (lambda x, *rest: built(x.to(self.dtype), *rest).float()), list(params.values())

    def gradients(self, step: int) -> list[Tensor]:
        """The mean over ranks and micro-batches, float32."""
        scale, parts = SCALE[self.config.precision], self.config.accumulation(RANKS)
        student, params = self.network(self.masters)
        target, _ = self.network(self.averages["ema/target"])
        objective = build_objective(ConsistencyConfig(), 0)
        means = [torch.zeros_like(p) for p in self.masters.values()]
        for rank in range(RANKS):
            for micro in read_share(step, rank, RANKS).split(parts):
                loss = scale * objective.loss(micro, student, target, step).total
                for mean, grad in zip(means, torch.autograd.grad(loss, params), strict=True):
                    mean += grad.float() / (scale * RANKS * parts)
        return means

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Norm of the gradient before clipping; weights, moments and averages are taken on."""
        with torch.enable_grad():
            grads = self.gradients(step)
        norm, most = float(torch.cat([g.flatten() for g in grads]).norm()), self.config.grad_clip
        beta1, beta2 = self.config.betas
        for (name, master), grad in zip(self.masters.items(), grads, strict=True):
            grad *= min(1.0, most / norm) if most else 1.0
            first, second = self.moments["exp_avg", name], self.moments["exp_avg_sq", name]
            first.mul_(beta1).add_(grad, alpha=1 - beta1)
            second.mul_(beta2).add_(grad**2, alpha=1 - beta2)
            moments = first.flatten(), second.flatten()
            master += adamw(self.config, step, self.decays[name], master.flatten(), *moments).view(
                master.shape
            )
            for kind, average in self.averages.items():
                decay = decay_of(kind, step, self.config)
                average[name] = decay * average[name] + (1 - decay) * master
        return norm

    def state(self) -> State:
        whole = {("master", name): p.detach() for name, p in self.masters.items()} | self.moments
        whole |= {(k, name): v for k, values in self.averages.items() for name, v in values.items()}
        return {key: value.flatten().clone() for key, value in whole.items()}


def adamw(
    config: TrainConfig, step: int, weight_decay: float, weight: Tensor, m: Tensor, v: Tensor
) -> Tensor:
    """What AdamW adds to a weight in step `step` (from 0), once it has the moments of that step."""
    beta1, beta2 = config.betas
    m, v = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
    return -LR * (weight_decay * weight + m / (v.sqrt() + 1e-8))


@cache
def reference(precision: str, accumulated: bool) -> tuple[list[float], list[State]]:
    """Norms of all steps, and the states before them and at the end."""
    plain = MixedPrecision(settings(precision, accumulated))
    norms, states = [], [plain.state()]
    for step in range(STEPS):
        norms.append(plain.step(step))
        states.append(plain.state())
    return norms, states


# -----------------------------------------------------------------------------------------------
# The engine


def steps_rank(rank: int, world_size: int, cases: list) -> list[tuple]:
    """By case: norms of all steps, and this rank's pieces of the states before them and at the end.

    A step that overflows in fp16 is taken again, as the loop does it.
    """
    allow_fp16()
    found = []
    for stage, *run in cases:
        config = settings(*run, stage)
        engine, objective = zero_engine(config), build_objective(ConsistencyConfig(), 0)
        norms, states = [], [pieces(engine)]
        for step in range(STEPS):
            micros = read_share(step, rank, world_size).split(config.accumulation(world_size))
            engine.overflowed = True
            while engine.overflowed:
                for index, micro in enumerate(micros, start=1):
                    loss = objective.loss(micro, engine.student, engine.target, step).total
                    engine.backward(loss, last=index == len(micros))
                norm = engine.step(step, LR)
            norms.append(norm)
            states.append(pieces(engine))
        found.append((norms, states))
    return found


def pieces(engine) -> list[tuple[str, str, int, Tensor]]:
    return [(f.kind, f.name, f.start, f.data.clone()) for f in engine.fragments()]


def whole(ranks: list[list]) -> State:
    """The state that the ranks hold together; no element of it twice."""
    found: State = {}
    for kind, name, start, data in sorted(chain(*ranks), key=lambda piece: piece[2]):
        have = found.get((kind, name), torch.empty(0))
        assert len(have) == start
        found[kind, name] = torch.cat([have, data])
    return found


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict:
    """By case: norms by rank, and states. One start of two processes for all of them."""
    ranks = run_ranks(steps_rank, RANKS, tmp_path_factory.mktemp("two") / "ranks", CASES)
    found = {}
    for case, results in zip(CASES, zip(*ranks, strict=True), strict=True):
        by_rank = [states for _, states in results]
        found[case] = (
            [norms for norms, _ in results],
            [whole(list(parts)) for parts in zip(*by_rank, strict=True)],
        )
    return found


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def way(state: State, start: State, kind: str) -> Tensor:
    """How far weights or averages are from the start, all in one vector."""
    keys = sorted(key for key in state if key[0] == kind)
    return torch.cat([without_key_bias(key[1], state[key] - start[key]) for key in keys])


@each_case
def test_norm_and_moments_are_those_of_plain_mixed_precision(engines, case):
    """A factor that Adam hides from the weights is seen here: of the loss, or of fp16's scale."""
    norms, states = engines[case]
    expected_norms, expected = reference(*case[1:])
    rounding, most = ROUNDING[case[1]], settings(*case[1:]).grad_clip
    for of_rank in norms:
        assert of_rank == pytest.approx(expected_norms, rel=rounding)
    assert min(expected_norms) > most  # so that clipping, where it is asked for, does something
    for found, plain in zip(states[1:], expected[1:], strict=True):
        assert found.keys() == plain.keys()
        for kind, name in plain:
            tolerance = {"exp_avg": 2 * rounding, "exp_avg_sq": 4 * rounding}.get(kind)
            if tolerance:
                assert gap(found[kind, name], plain[kind, name]) < tolerance, (kind, name)


@each_case
def test_weights_and_averages_go_the_way_of_plain_mixed_precision(engines, case):
    _, states = engines[case]
    _, expected = reference(*case[1:])
    assert all(torch.equal(states[0][key], value) for key, value in expected[0].items())
    for kind in ("master", *AVERAGES):
        for found, plain in zip(states[1:], expected[1:], strict=True):
            ours, theirs = (way(state, expected[0], kind) for state in (found, plain))
            assert gap(ours, theirs) < WAY[case[1]], kind


@each_case
def test_every_step_of_the_masters_is_adamw_with_the_moments_at_hand(engines, case):
    """To 1e-6 in 16 bits too: masters are float32, and no step is rounded."""
    config = settings(*case[1:])
    decays = MixedPrecision(config).decays
    _, states = engines[case]
    for step, (before, after) in enumerate(pairwise(states)):
        for name, decay in decays.items():
            weight, moments = before["master", name], (after[k, name] for k in MOMENTS)
            expected = weight + adamw(config, step, decay, weight, *moments)
            torch.testing.assert_close(after["master", name], expected, rtol=0, atol=1e-6)


@each_case
def test_an_average_is_the_recursion_over_the_masters_this_engine_had(engines, case):
    """m <- d m + (1 - d) w to 1e-6, whatever rounding made of w."""
    config = settings(*case[1:])
    _, states = engines[case]
    for kind in AVERAGES:
        decays = [decay_of(kind, step, config) for step in range(STEPS)]
        assert len(set(decays)) > 1
        for decay, (before, after) in zip(decays, pairwise(states), strict=True):
            for name in (name for found, name in after if found == kind):
                expected = decay * before[kind, name] + (1 - decay) * after["master", name]
                torch.testing.assert_close(after[kind, name], expected, rtol=0, atol=1e-6)
