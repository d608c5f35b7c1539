"""DeepSpeedEngine: ZeRO behind the protocol of `distill.engine.engine`. The only importer of
deepspeed.

DeepSpeed partitions, reduces and steps; where it lays the state of a parameter,
`cluster.trainer.partition` knows. It writes no checkpoint here: we hand out the pieces by parameter
name and offset (`fragments`), so `distill.checkpoint.commit` can commit them and open them at any
world size.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import deepspeed
import torch
from torch import Tensor, distributed as dist, nn

from cluster.plan.memory import REDUCE_BUCKET
from cluster.trainer import partition
from distill.conditions.condition import Condition
from distill.config import ConfigError, TrainConfig
from distill.engine import engine
from distill.networks import files, layers

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

# DeepSpeed probes which of its C++ operators could be compiled, and compiles one for gloo, at every
# start. None is used here: ZeRO runs on torch's collectives and torch's AdamW. So a machine without
# a compiler will do, and a start is seconds shorter.
deepspeed.ops.__compatible_ops__ = {}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_LOSS_SCALE = 1
PLAIN_LINEAR = nn.functional.linear
PASSES_LEFT = "applied_pre_backward_ref_cnt"  # DeepSpeed hangs it on every layer at stage 3


# DeepSpeed's names of what is offloaded, by `train.offload`.
OFFLOADED = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "optimizer_and_parameters": ("offload_optimizer", "offload_param"),
}


def deepspeed_config(config: TrainConfig, world_size: int, numel: int) -> dict[str, object]:
    """The DeepSpeed settings of a run whose network has `numel` trained weights."""
    accumulation = config.accumulation(world_size)
    host = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {
            "stage": max(config.zero_stage, 1),  # stage 0 is stage 1 over one rank
            "stage3_param_persistence_threshold": 0,  # no parameter stays whole
            "reduce_bucket_size": min(REDUCE_BUCKET, numel),  # it is allocated whole
            **dict.fromkeys(OFFLOADED[config.offload], host),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW steps in host memory
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {
            "enabled": config.precision == "fp16",
            "hysteresis": 1,  # every overflow halves the scale
            "min_loss_scale": MIN_LOSS_SCALE,
        },
        "steps_per_print": 10**9,
    }


class _LossModule(nn.Module):
    """The network as DeepSpeed sees it: a module whose forward takes the loss and returns it.

    DeepSpeed hooks itself to what a forward returns, and any pass back through that starts its
    reduction and divides by the accumulation steps: that of `autograd.grad` as well as the step's
    own. So it gets the loss to hook to, and the network is called directly.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, loss: Tensor) -> Tensor:
        return loss.view_as(loss)  # another tensor: the hook belongs to this pass alone


@contextmanager
def _plain_linear() -> Iterator[None]:
    """DeepSpeed's stage 3 replaces `F.linear` for the whole process; here it is torch's own."""
    replaced, nn.functional.linear = nn.functional.linear, PLAIN_LINEAR
    try:
        yield
    finally:
        nn.functional.linear = replaced


class DeepSpeedEngine(partition.GroupPeers):
    """One rank of ZeRO. The process group must be up."""

    def __init__(
        self, network: layers.AbstractNetwork, config: TrainConfig, device: torch.device
    ) -> None:
        super().__init__(device)
        self.background: engine.Peers = partition.background_peers() if config.save_async else self
        self._config, self._stage = config, config.zero_stage
        self._dtype = DTYPES[config.precision]
        network.activation_checkpointing = config.activation_checkpointing
        self.fixed = files.fixed_tensors(network)  # before DeepSpeed rounds them to the precision
        # The frozen copy is taken before DeepSpeed hangs hooks on the module.
        copy = engine.frozen_copy(network).to(self._dtype)
        self._network = network
        self._call = layers.compiled(network) if config.compile else network
        self._params = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._shapes = {name: tuple(param.shape) for name, param in self._params.items()}
        weights = {name: p.detach().float().clone() for name, p in self._params.items()}
        self._engine, self._zero = self._initialize()
        self._partition, self._copies = self._lay_out(copy)
        masters = self._partition.masters
        self._adam_state = [engine.empty_adam_state(master) for master in masters]
        for master, state in zip(masters, self._adam_state, strict=True):
            self._zero.optimizer.state[master] = state
        for piece in self._partition.pieces:  # DeepSpeed made them from rounded weights
            whole = weights[piece.name].flatten()
            piece.of(masters).copy_(whole.narrow(0, piece.start, piece.length))
        self._averages = {
            engine.TARGET: engine.Average(config.ema_target, masters),
            engine.EVALUATION: engine.Average(config.ema_evaluation, masters),
        }
        # All that a checkpoint holds, by kind of fragment.
        self._state = {engine.MASTER: masters}
        self._state |= {
            key: [s[key] for s in self._adam_state] for key in (engine.EXP_AVG, engine.EXP_AVG_SQ)
        }
        self._state |= {engine.average_kind(k): a.values for k, a in self._averages.items()}
        self.overflowed = False

    def _initialize(self) -> tuple[Any, Any]:
        """DeepSpeed's engine and optimizer."""
        if self._config.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
            raise ConfigError("train.precision=fp16 does not work on this device; set bf16 or fp32")
        optimizer = engine.new_optimizer(self._network, self._config)
        numel = sum(param.numel() for param in self._params.values())
        wrapped, zero, _, _ = deepspeed.initialize(
            model=_LossModule(self._network),
            optimizer=optimizer,
            config=deepspeed_config(self._config, self.world_size, numel),
            mpu=partition.OneRank() if self._stage == 0 else None,
        )
        deepspeed.utils.groups.mpu = None  # it would hold for the next engine too
        zero.loss_scaler.raise_error_at_min_scale = False  # the loop finds out what is wrong
        return wrapped, zero

    def _lay_out(
        self, copy: layers.AbstractNetwork
    ) -> tuple[partition.Partition, dict[str, partition.FrozenCopy]]:
        """Where the state lies, and a network for every kind of it that may be called."""
        kinds = (
            engine.MASTER,
            engine.average_kind(engine.TARGET),
            engine.average_kind(engine.EVALUATION),
        )
        if self._stage == 3:
            parts = partition.ParameterPartition(self._zero, self._params, self.device)
            return parts, {kind: partition.PassingCopy(deepcopy(copy), parts) for kind in kinds}
        num_parts = self.world_size if self._stage else 1
        flat = partition.FlatPartition(self._zero, self._params, num_parts, self.device)
        whole = partition.WholeCopy(copy.to(self.device), flat, self._config.compile)
        return flat, {kind: whole for kind in kinds}

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "deepspeed",
            "zero_stage": self._stage,
            "precision": self._config.precision,
            "averages": {kind: average.decay for kind, average in self._averages.items()},
            "parameters": self._shapes,
        }

    def student(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        if self._stage == 3 and not torch.is_grad_enabled():
            # What DeepSpeed puts into a layer has no forward mode, and nothing here needs it.
            with _plain_linear():
                return self._frozen(engine.MASTER, x, t, s, condition)
        return self._call(x.to(self._dtype), t, s, condition).float()

    def target(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        return self._frozen(engine.average_kind(engine.TARGET), x, t, s, condition)

    def evaluation(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        return self._frozen(engine.average_kind(engine.EVALUATION), x, t, s, condition)

    def _frozen(self, kind: str, x: Tensor, *rest: Any) -> Tensor:
        """u with the weights of `kind`. Collective: every rank calls it at the same places."""
        copy, vectors = self._copies[kind], self._state[kind]
        return copy.run(vectors, x.to(self._dtype), *rest).float()

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(self._engine(loss))
        if self._stage == 0 and self.world_size > 1 and last:
            self._average_gradients()

    def _average_gradients(self) -> None:
        """Stage 0: DeepSpeed sees one rank; here the gradients of all meet. Collective."""
        for grads in self._zero.averaged_gradients.values():
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad) / self.world_size)

    def gradient_norms(self, losses: list[Tensor]) -> Tensor:
        with self._extra_pass():
            grads = engine.last_layer_gradients(self._network, losses)
        dist.all_reduce(grads)
        return (grads / self.world_size).norm(dim=1)

    def has_finite_gradient(self, loss: Tensor) -> bool:
        with self._extra_pass():
            return engine.is_gradient_finite(loss, self._params.values())

    def step(self, step: int, lr: float) -> float:
        for group in self._zero.param_groups:
            group["lr"] = lr
        scale = self._zero.loss_scale
        self._engine.step()  # DeepSpeed too drops a step whose norm is not finite
        norm = float(self._engine.get_global_grad_norm())
        assert self._engine.was_step_applied() == math.isfinite(norm)
        self.overflowed = not math.isfinite(norm) and scale > MIN_LOSS_SCALE
        if math.isfinite(norm):
            for average in self._averages.values():
                average.update(step, self._partition.masters)
            self._forget_copies()
        return norm

    def fragments(self) -> Iterator[engine.Fragment]:
        for piece in self._partition.pieces:
            if self._stage == 0:  # all ranks hold everything; each answers for its share
                piece = piece.share(self.rank, self.world_size)
            for kind, vectors in self._state.items():
                yield engine.Fragment(kind, piece.name, piece.start, piece.of(vectors))

    def load(self, read: engine.FragmentReader, step: int) -> None:
        for piece in self._partition.pieces:
            for kind, vectors in self._state.items():
                piece.of(vectors).copy_(read(kind, piece.name, piece.start, piece.length))
        for state in self._adam_state:
            state["step"].fill_(step)
        self._partition.refresh()
        self._forget_copies()

    def _forget_copies(self) -> None:
        for copy in self._copies.values():
            copy.forget()

    @contextmanager
    def _extra_pass(self) -> Iterator[None]:
        """A pass back before the step's own, which DeepSpeed's stage 3 is not to count.

        It counts the passes that a layer still has before it, and gathers weights while there are.
        """
        counts = {m: vars(m).get(PASSES_LEFT) for m in self._network.modules()}
        yield
        for module, count in counts.items():
            if count is not None:
                vars(module)[PASSES_LEFT] = count
        if self._stage == 3:
            self._zero.parameter_offload.release_backward_leftovers()
