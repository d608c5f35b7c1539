"""DeepSpeedEngine: ZeRO behind the protocol of `distill.engine`. The only importer of deepspeed.

ZeRO keeps each parameter group as one flat float32 vector, cut into equal pieces over the ranks.
DeepSpeed writes no checkpoint here: we hand out the pieces by parameter name and offset
(`fragments`), so `distill.checkpoint` can commit them and open them at any world size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.config import ConfigError, TrainConfig
from distill.ema import Average
from distill.engine import (
    EVALUATION,
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    TARGET,
    Fragment,
    FragmentReader,
    average_kind,
    frozen_copy,
    is_gradient_finite,
    last_layer_gradients,
    parameter_groups,
)
from distill.networks.layers import AbstractNetwork

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

# DeepSpeed probes which of its C++ operators could be compiled, and compiles one for gloo, at every
# start. None is used here: ZeRO runs on torch's collectives and torch's AdamW. So a machine without
# a compiler will do, and a start is seconds shorter.
deepspeed.ops.__compatible_ops__ = {}


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, object]:
    """The DeepSpeed settings of a run."""
    accumulation = config.accumulation(world_size)
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
    }


class _LossModule(nn.Module):
    """The network as DeepSpeed sees it: a module whose forward takes the loss and returns it.

    DeepSpeed hooks itself to what a forward returns, and any pass back through that starts its
    reduction and divides by the accumulation steps: `autograd.grad` and a double backward as well
    as the step's own. So it gets the loss to hook to, and the network is called directly.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, loss: Tensor) -> Tensor:
        return loss.view_as(loss)  # another tensor: the hook belongs to this pass alone


class DeepSpeedEngine:
    """One rank of ZeRO stage 1 or 2. The process group must be up."""

    def __init__(self, network: AbstractNetwork, config: TrainConfig, device: torch.device) -> None:
        if config.zero_stage not in (1, 2):
            raise ConfigError(f"train.zero_stage={config.zero_stage} is not supported; use 1 or 2")
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        self._config = config
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        # The frozen copy is taken before DeepSpeed hangs hooks on the module.
        self._target = frozen_copy(network).to(device=device, dtype=self._dtype)
        optimizer = torch.optim.AdamW(
            parameter_groups(network, config.weight_decay),
            lr=0.0,
            betas=(config.betas[0], config.betas[1]),
        )
        weights = {name: p.detach().float().clone() for name, p in network.named_parameters()}
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=_LossModule(network),
            optimizer=optimizer,
            config=deepspeed_config(config, self.world_size),
        )
        self._network = network
        self._params = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._masters: list[Tensor] = self._zero.single_partition_of_fp32_groups
        self._adam_state = [_empty_adam_state(master) for master in self._masters]
        for master, state in zip(self._masters, self._adam_state, strict=True):
            self._zero.optimizer.state[master] = state
        self._averages: dict[str, Average] = {}
        for fragment in self.fragments():  # DeepSpeed made them from weights rounded to bf16
            if fragment.kind == MASTER:
                whole = weights[fragment.name].flatten()
                fragment.data.copy_(whole.narrow(0, fragment.start, fragment.data.numel()))
        self._averages = {
            TARGET: Average(config.ema_target, self._masters),
            EVALUATION: Average(config.ema_evaluation, self._masters),
        }
        self._target_is_stale = True

    def describe(self) -> dict[str, object]:
        return {
            "engine": "deepspeed",
            "zero_stage": self._config.zero_stage,
            "precision": self._config.precision,
            "averages": {kind: average.decay for kind, average in self._averages.items()},
            "parameters": {name: list(param.shape) for name, param in self._params.items()},
        }

    def student(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        return self._network(x.to(self._dtype), t, s, label).float()

    def target(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        if self._target_is_stale:
            self._gather_target()
        return self._target(x.to(self._dtype), t, s, label).float()

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(self._engine(loss))

    def gradient_norms(self, losses: list[Tensor]) -> Tensor:
        grads = last_layer_gradients(self._network, losses)
        dist.all_reduce(grads)
        return (grads / self.world_size).norm(dim=1)

    def has_finite_gradient(self, loss: Tensor) -> bool:
        return is_gradient_finite(loss, self._params.values())

    def step(self, step: int, lr: float) -> float:
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()  # DeepSpeed too drops a step whose norm is not finite
        norm = float(self._engine.get_global_grad_norm())
        assert self._engine.was_step_applied() == math.isfinite(norm)
        if math.isfinite(norm):
            for average in self._averages.values():
                average.update(step, self._masters)
            self._target_is_stale = True
        return norm

    def fragments(self) -> Iterator[Fragment]:
        for name, param in self._params.items():
            # DeepSpeed hangs this on the parameter; None where this rank holds nothing of it.
            mapping = cast(Any, param)._hp_mapping
            if mapping is None:
                continue
            group, start = mapping.param_group_index, mapping.lp_fragment_address.start
            address = mapping.hp_fragment_address
            flat = {
                MASTER: self._masters[group],
                EXP_AVG: self._adam_state[group][EXP_AVG],
                EXP_AVG_SQ: self._adam_state[group][EXP_AVG_SQ],
            }
            flat |= {average_kind(k): a.values[group] for k, a in self._averages.items()}
            for kind, vector in flat.items():
                piece = vector.detach().narrow(0, address.start, address.numel)
                yield Fragment(kind, name, start, piece)

    def load(self, read: FragmentReader, step: int) -> None:
        for fragment in self.fragments():
            length = fragment.data.numel()
            fragment.data.copy_(read(fragment.kind, fragment.name, fragment.start, length))
        for state in self._adam_state:
            state["step"].fill_(step)
        self._zero.update_lp_params()  # masters -> the working copy on every rank
        self._target_is_stale = True

    def any(self, flag: bool) -> bool:
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def gather(self, values: Tensor) -> Tensor:
        rows = [torch.empty_like(values, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(rows, values.to(self.device).contiguous())
        return torch.stack(rows).to(values.device)

    @torch.no_grad()
    def _gather_target(self) -> None:
        """Fills the target network from the pieces of its average. Collective.

        Every rank calls the target at the same places of a step, since objectives decide nothing
        by data.
        """
        names = {id(param): name for name, param in self._params.items()}
        for group, piece in enumerate(self._averages[TARGET].values):
            rows = [torch.empty_like(piece) for _ in range(self.world_size)]
            dist.all_gather(rows, piece)
            flat = torch.cat(rows)
            params = self._zero.round_robin_bit16_groups[group]
            offsets = self._zero.round_robin_bit16_offsets[group]
            for param, offset in zip(params, offsets, strict=True):
                target = self._target.get_parameter(names[id(param)])
                target.copy_(flat[offset : offset + param.numel()].view_as(target))
        self._target_is_stale = False


def _empty_adam_state(master: Tensor) -> dict[str, Tensor]:
    """State before the first step, made here so that a checkpoint has somewhere to load to."""
    return {
        "step": torch.tensor(0.0),
        EXP_AVG: torch.zeros_like(master),
        EXP_AVG_SQ: torch.zeros_like(master),
    }
