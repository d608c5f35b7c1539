"""Where ZeRO keeps the state of each parameter, and networks that run on other weights of it.

Stages 0, 1 and 2 keep each parameter group as one flat float32 vector, cut into equal pieces over
the ranks (stage 0: over this rank alone). Stage 3 cuts every parameter by itself and lays a rank's
pieces one behind the other. The places are read from DeepSpeed's private fields, here alone.

With `train.offload` the vectors lie in host memory, and so does all that is laid out like them:
moments and averages. What other ranks or a network need of them goes through the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed as dist, nn

from distill.networks.layers import AbstractNetwork, compiled


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one parameter in a vector of this rank.

    Attributes:
        name: parameter name.
        start: its first element within the flattened parameter.
        length: elements.
        vector: which of the rank's vectors holds it.
        offset: its first element there.
    """

    name: str
    start: int
    length: int
    vector: int
    offset: int

    def share(self, rank: int, world_size: int) -> "Piece":
        """Part `rank` of this piece cut into `world_size`."""
        low, high = (self.length * index // world_size for index in (rank, rank + 1))
        return Piece(self.name, self.start + low, high - low, self.vector, self.offset + low)

    def of(self, vectors: list[Tensor]) -> Tensor:
        """[length] view: this piece of the state that `vectors` hold."""
        return vectors[self.vector].detach().narrow(0, self.offset, self.length)


class Partition(Protocol):
    """The float32 vectors of a rank and where each parameter lies in them.

    Attributes:
        masters: the vectors of the master weights; moments and averages are laid out like them.
        pieces: what this rank holds.
    """

    masters: list[Tensor]
    pieces: list[Piece]

    def refresh(self) -> None:
        """Copies the masters into the weights that the network works with. Collective."""


class OneRank:
    """For DeepSpeed at stage 0: data parallel over this rank alone, so nothing is partitioned."""

    def __init__(self) -> None:
        self._group, _ = dist.new_subgroups(group_size=1)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    get_model_parallel_group = get_data_parallel_group
    get_model_parallel_world_size = get_data_parallel_world_size
    get_model_parallel_rank = get_data_parallel_rank


class FlatPartition:
    """Stages 0 to 2: a vector per parameter group, a group's ranks each hold an equal part."""

    def __init__(
        self, zero: Any, params: dict[str, nn.Parameter], num_parts: int, device: torch.device
    ) -> None:
        """`zero` is DeepSpeed's optimizer; `num_parts` the ranks that share a vector."""
        self._zero, self._num_parts, self._device = zero, num_parts, device
        self.masters: list[Tensor] = zero.single_partition_of_fp32_groups
        self.pieces = list(self._pieces(params))
        self._names = {id(param): name for name, param in params.items()}

    @staticmethod
    def _pieces(params: dict[str, Any]) -> Iterator[Piece]:
        for name, param in params.items():
            mapping = param._hp_mapping  # None where this rank holds nothing of it
            if mapping is not None:
                start, address = mapping.lp_fragment_address.start, mapping.hp_fragment_address
                yield Piece(name, start, address.numel, mapping.param_group_index, address.start)

    def refresh(self) -> None:
        self._zero.update_lp_params()

    def whole(self, vectors: list[Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(name, flattened values in `dtype`) of every parameter. Collective."""
        for index, vector in enumerate(vectors):
            flat = vector.detach().to(self._device, dtype)
            if self._num_parts > 1:
                part, flat = flat, flat.new_empty(self._num_parts * len(flat))
                dist.all_gather_into_tensor(flat, part)
            params = self._zero.round_robin_bit16_groups[index]
            offsets = self._zero.round_robin_bit16_offsets[index]
            for param, offset in zip(params, offsets, strict=True):
                yield self._names[id(param)], flat.narrow(0, offset, param.numel())


class ParameterPartition:
    """Stage 3: every parameter in equal parts over all ranks, the last one padded."""

    def __init__(self, zero: Any, params: dict[str, nn.Parameter], device: torch.device) -> None:
        self._zero, self.device = zero, device
        self.masters: list[Tensor] = zero.fp32_partitioned_groups_flat
        # By name: vector, offset, elements of a part with its padding.
        self._places: dict[str, tuple[int, int, int]] = {}
        self.pieces: list[Piece] = []
        names = {id(param): name for name, param in params.items()}
        for vector, group in enumerate(zero.fp16_groups):
            offset = 0
            for param in group:
                name, part = names[id(param)], param.partition_numel()
                self._places[name] = (vector, offset, part)
                start = dist.get_rank() * part
                length = min(part, param.ds_numel - start)
                if length > 0:
                    self.pieces.append(Piece(name, start, length, vector, offset))
                offset += part

    def refresh(self) -> None:
        self._zero.parameter_offload.partition_all_parameters()  # lets go of what is gathered
        for vector in range(len(self.masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(vector)

    def gather(self, names: list[str], vectors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Flattened values of some parameters, with padding, in `dtype`. Collective."""
        places = [self._places[name] for name in names]
        mine = [vectors[v].detach().narrow(0, start, part) for v, start, part in places]
        flat = torch.cat(mine).to(self.device, dtype)
        rows = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, flat)
        columns = zip(*(row.split([part for *_, part in places]) for row in rows), strict=True)
        return [torch.cat(parts) for parts in columns]


# -----------------------------------------------------------------------------------------------
# Networks that run on other weights than those under training


class FrozenCopy(Protocol):
    """A network that runs on the float32 vectors of a rank: an average, or the masters."""

    def run(self, vectors: list[Tensor], *inputs: Tensor) -> Tensor:
        """The network's output. Gradient reaches the inputs, never the weights. Collective."""

    def forget(self) -> None:
        """To be called when the vectors have changed."""


class WholeCopy:
    """Keeps all the weights it last ran with; for stages 0 to 2."""

    def __init__(
        self, network: AbstractNetwork, partition: FlatPartition, is_compiled: bool
    ) -> None:
        self._network, self._partition = network, partition
        self._call = compiled(network) if is_compiled else network
        self._holds: list[Tensor] | None = None

    def run(self, vectors: list[Tensor], *inputs: Tensor) -> Tensor:
        if self._holds is not vectors:
            with torch.no_grad():
                dtype = self._network.last_layer.dtype
                for name, values in self._partition.whole(vectors, dtype):
                    weight = self._network.get_parameter(name)
                    weight.copy_(values.view_as(weight))
            self._holds = vectors
        return self._call(*inputs)

    def forget(self) -> None:
        self._holds = None


class PassingCopy:
    """Has no weights: each layer gathers its own while it is called; for stage 3.

    The weights of a call are new tensors. So those that a gradient needs live until it is taken,
    and all others end with the layer's call.
    """

    def __init__(self, network: nn.Module, partition: ParameterPartition) -> None:
        self._partition = partition
        self._vectors: list[Tensor] = []
        for prefix, module in network.named_modules():
            if dict(module.named_parameters(recurse=False)):
                self._pass_through(prefix, module)
        self._network = network.to(partition.device)

    def _pass_through(self, prefix: str, module: nn.Module) -> None:
        shapes = {name: p.shape for name, p in module.named_parameters(recurse=False)}
        dtype = next(module.parameters(recurse=False)).dtype

        def empty(*_: Any) -> None:
            for name in shapes:
                nothing = torch.empty(0, dtype=dtype, device=self._partition.device)
                setattr(module, name, nn.Parameter(nothing, requires_grad=False))

        def fill(*_: Any) -> None:
            names = [f"{prefix}.{name}".lstrip(".") for name in shapes]
            values = self._partition.gather(names, self._vectors, dtype)
            for (name, shape), flat in zip(shapes.items(), values, strict=True):
                weight = flat[: shape.numel()].view(shape)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))

        empty()
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)

    def run(self, vectors: list[Tensor], *inputs: Tensor) -> Tensor:
        self._vectors = vectors
        return self._network(*inputs)

    def forget(self) -> None:
        pass


class GroupPeers:
    """All ranks of a training, as a process group joins them; None is the usual one.

    Calls over one group meet each other in the order they are made. So a thread that makes some of
    its own needs a group of its own.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device, self._group = device, group

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Collective."""
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return bool(value)

    def gather(self, values: Tensor) -> Tensor:
        """[world_size, *values.shape]: `values` of all ranks, in rank order. Collective."""
        rows = [torch.empty_like(values, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(rows, values.to(self.device).contiguous(), group=self._group)
        return torch.stack(rows).to(values.device)


def background_peers() -> GroupPeers:
    """All ranks for a thread of each, beside the calls of training. Collective."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return GroupPeers(torch.device("cpu"), group)
