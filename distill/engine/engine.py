"""Engine: the model under training, however it is spread over processes.

The loop in `distill.training.loop` sees only this protocol. `TorchEngine` is one process;
`cluster.trainer.zero.DeepSpeedEngine` is ZeRO. Both keep their state as `Fragment`s, pieces of
named parameters, so a checkpoint of one opens in the other and on any number of ranks.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distill.conditions.condition import Condition
from distill.config import TrainConfig
from distill.networks import files, layers

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
TARGET, EVALUATION = "target", "evaluation"


def average_kind(name: str) -> str:
    """The fragment kind of a weight average."""
    return f"ema/{name}"


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one flattened float32 state tensor, held by one rank.

    Attributes:
        kind: "master", "exp_avg", "exp_avg_sq" or "ema/<name>".
        name: parameter name.
        start: index of the first element within the flattened parameter.
        data: [n] float32 view of the live state; loading copies into it.
    """

    kind: str
    name: str
    start: int
    data: Tensor


# (kind, name, start, length) -> [length] float32 values of a verified checkpoint
FragmentReader = Callable[[str, str, int, int], Tensor]


@runtime_checkable
class Peers(Protocol):
    """All ranks of a training as one of them sees the others."""

    rank: int
    world_size: int

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Collective, so also a barrier."""

    def gather(self, values: Tensor) -> Tensor:
        """[world_size, *values.shape]: `values` of all ranks, in rank order. Collective."""


@runtime_checkable
class Engine(Peers, Protocol):
    """One rank of a model under training.

    Attributes:
        background: the same ranks for a thread of each, beside training; there with
            `train.save_async` only.
        overflowed: whether the last step was dropped because its gradients, scaled up for fp16,
            left that range. The scale is lower now, and the same step is to be taken again.
        fixed: the network's tensors that are not trained, as they were given (`fixed_tensors`).
    """

    background: Peers
    device: torch.device
    overflowed: bool
    fixed: dict[str, Tensor]

    def describe(self) -> dict[str, Any]:
        """What a manifest says: kind, ZeRO stage, precision, averages, shapes by name."""

    def student(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """u(x, t, s, condition) of the weights under training, float32, with gradient."""

    def target(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """u of the "target" average: gradient reaches `x`, never the weights."""

    def evaluation(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """u of the "evaluation" average, in the same way."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradient of `loss`, a mean over this rank's micro-batch.

        `last` marks the last micro-batch of a step.
        """

    def gradient_norms(self, losses: list[Tensor]) -> Tensor:
        """[len(losses)] float32: |d loss / d w| of each scalar, a mean over this rank's samples.

        w is the weight of the network's last layer. The gradient is averaged over ranks before its
        norm is taken, so the number of ranks changes nothing. Keeps the graph and leaves the
        gradients that `backward` gathers alone. Collective.
        """

    def has_finite_gradient(self, loss: Tensor) -> bool:
        """Whether the gradient of this rank's `loss` is finite in every weight.

        Keeps the graph and leaves the gradients that `backward` gathers alone. Collective where
        weights are partitioned; the answer is this rank's own.
        """

    def step(self, step: int, lr: float) -> float:
        """Averages gradients over ranks and micro-batches, clips, updates weights and averages.

        Returns the global gradient norm before clipping, the same on every rank. When it is not
        finite, nothing is applied, and the gradients are dropped.
        """

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of the state; every element of every tensor is held by one rank."""

    def load(self, read: FragmentReader, step: int) -> None:
        """Sets the state after `step` optimizer steps."""


def decay_at(step: int, decay: float) -> float:
    """Decay of update number `step` (from 0): min(decay, (1 + step) / (10 + step)).

    The ramp forgets the random start of a short run; it is the one of common EMA libraries.
    """
    return min(decay, (1 + step) / (10 + step))


class Average:
    """Moving average m <- d m + (1 - d) w over a list of float32 tensors.

    Attributes:
        decay: d, reached after the ramp of `decay_at`.
        values: the averages, one per master tensor.
    """

    def __init__(self, decay: float, masters: Sequence[torch.Tensor]) -> None:
        self.decay = decay
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, step: int, masters: Sequence[torch.Tensor]) -> None:
        """Takes in the masters after optimizer step `step` (from 0)."""
        weight = 1 - decay_at(step, self.decay)
        torch._foreach_lerp_(self.values, [master.detach() for master in masters], weight)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups: matrices with weight decay, norms and biases without."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def new_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, fused: one pass over the weights, where plain PyTorch makes a dozen."""
    betas = (config.betas[0], config.betas[1])
    groups = parameter_groups(network, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def empty_adam_state(weight: Tensor) -> dict[str, Tensor]:
    """State before the first step, made early so that a checkpoint has somewhere to load to."""
    return {
        "step": torch.tensor(0.0, device=weight.device),  # the fused step wants it there
        EXP_AVG: torch.zeros_like(weight),
        EXP_AVG_SQ: torch.zeros_like(weight),
    }


def last_layer_gradients(network: layers.AbstractNetwork, losses: list[Tensor]) -> Tensor:
    """[len(losses), n] float32: gradient of each scalar by the n entries of `last_layer`."""
    w = network.last_layer
    rows = [torch.autograd.grad(o, w, retain_graph=True, materialize_grads=True)[0] for o in losses]
    return torch.stack(rows).flatten(1).float()


def is_gradient_finite(loss: Tensor, params: Iterable[Tensor]) -> bool:
    """Whether the gradient of `loss` by every one of `params` is finite; the graph is kept."""
    grads = torch.autograd.grad(loss, list(params), retain_graph=True, allow_unused=True)
    return all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None)


def frozen_copy(network: layers.AbstractNetwork) -> layers.AbstractNetwork:
    """A copy whose weights take no gradient, for the target average."""
    return copy.deepcopy(network).requires_grad_(False)


class TorchEngine:
    """The whole model in one process, float32. The reference for every other engine."""

    rank = 0
    world_size = 1
    overflowed = False

    def __init__(
        self, network: layers.AbstractNetwork, config: TrainConfig, device: torch.device
    ) -> None:
        self.device = device
        self.background: Peers = self
        self._config = config
        network.activation_checkpointing = config.activation_checkpointing
        self.fixed = files.fixed_tensors(network)
        self._network = network.to(device)
        self._params = {n: p for n, p in self._network.named_parameters() if p.requires_grad}
        self._optimizer = new_optimizer(self._network, config)
        for param in self._params.values():
            self._optimizer.state[param] = empty_adam_state(param)
        masters = list(self._params.values())
        self._averages = {
            TARGET: Average(config.ema_target, masters),
            EVALUATION: Average(config.ema_evaluation, masters),
        }
        self._target = self._average_network(TARGET)
        self._evaluation = self._average_network(EVALUATION)
        self._micro_batches = 0

    @property
    def averaged(self) -> layers.AbstractNetwork:
        """The network with the weights of the "evaluation" average, frozen: what is exported."""
        return self._evaluation

    def _average_network(self, kind: str) -> layers.AbstractNetwork:
        """A network whose weights *are* the average, so that it needs no update."""
        network = frozen_copy(self._network)
        for name, value in zip(self._params, self._averages[kind].values, strict=True):
            network.get_parameter(name).data = value
        return network

    def describe(self) -> dict[str, Any]:
        shapes = {name: tuple(param.shape) for name, param in self._params.items()}
        return {
            "engine": "torch",
            "zero_stage": 0,
            "precision": "fp32",
            "averages": {kind: average.decay for kind, average in self._averages.items()},
            "parameters": shapes,
        }

    def student(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        return self._network(x, t, s, condition)

    def target(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        return self._target(x, t, s, condition)

    def evaluation(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        return self._evaluation(x, t, s, condition)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        self._micro_batches += 1

    def gradient_norms(self, losses: list[Tensor]) -> Tensor:
        return last_layer_gradients(self._network, losses).norm(dim=1)

    def has_finite_gradient(self, loss: Tensor) -> bool:
        return is_gradient_finite(loss, self._params.values())

    def step(self, step: int, lr: float) -> float:
        params = list(self._params.values())
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = [param.grad for param in params if param.grad is not None]
        torch._foreach_div_(grads, float(self._micro_batches))
        total = torch.nn.utils.get_total_norm(grads)
        norm = float(total)  # all that is read from the device
        if math.isfinite(norm):
            if self._config.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(params, self._config.grad_clip, total)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            for average in self._averages.values():
                average.update(step, params)
        self._optimizer.zero_grad()
        self._micro_batches = 0
        return norm

    def fragments(self) -> Iterator[Fragment]:
        for index, (name, param) in enumerate(self._params.items()):
            state = self._optimizer.state[param]
            yield Fragment(MASTER, name, 0, param.detach().view(-1))
            yield Fragment(EXP_AVG, name, 0, state[EXP_AVG].view(-1))
            yield Fragment(EXP_AVG_SQ, name, 0, state[EXP_AVG_SQ].view(-1))
            for kind, average in self._averages.items():
                yield Fragment(average_kind(kind), name, 0, average.values[index].view(-1))

    def load(self, read: FragmentReader, step: int) -> None:
        for fragment in self.fragments():
            length = fragment.data.numel()
            fragment.data.copy_(read(fragment.kind, fragment.name, fragment.start, length))
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, values: Tensor) -> Tensor:
        return values[None]
