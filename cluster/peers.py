"""What ranks tell each other, over a process group of torch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class GroupPeers:
    """All ranks of a training, as a process group joins them; None is the usual one.

    Calls over one group meet each other in the order they are made. So a thread that makes some of
    its own needs a group of its own.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._device, self._group = device, group

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Collective."""
        value = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return bool(value)

    def gather(self, values: Tensor) -> Tensor:
        """[world_size, *values.shape]: `values` of all ranks, in rank order. Collective."""
        rows = [torch.empty_like(values, device=self._device) for _ in range(self.world_size)]
        dist.all_gather(rows, values.to(self._device).contiguous(), group=self._group)
        return torch.stack(rows).to(values.device)


def background_peers() -> GroupPeers:
    """All ranks for a thread of each, beside the calls of training. Collective."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return GroupPeers(torch.device("cpu"), group)
