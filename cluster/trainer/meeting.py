"""Ranks meet before their group counts: each answers, computes alone, then all add up a number.

So a rank whose process stands still, whose device computes wrong, or who cannot reach the others is
named with its node after minutes, where a collective would wait for half an hour and name nobody.
"""

import os
import socket
from collections.abc import Callable
from concurrent import futures
from typing import Any

import psutil
import torch
import torch.distributed as dist

from cluster.pool.preflight import check_device

MEETING_S = 180.0  # for each of these
SIZE = 4096
SHOWN = 8  # ranks that a sentence names
STACK = (" ", "\t", "frame #", "Exception raised from")  # what its lines begin with

Ask = Callable[..., futures.Future[Any]]  # (rank, function, *arguments) -> what it returns there


class MeetingFailed(RuntimeError):
    """Ranks cannot work together. The message says which, and where."""


def meet(ask: Ask, names: list[str], device: Callable[[], torch.device]) -> None:
    """Raises MeetingFailed unless all ranks compute, and add up a number. The process group is up.

    `names` are the ranks' places; `device` says in each what it computes on.
    """
    hear("computes", names, [ask(rank, compute, device) for rank in range(len(names))])
    hear("adds up with the others", names, [ask(r, add_up, device) for r in range(len(names))])


def hear(what: str, names: list[str], answers: list[futures.Future[Any]]) -> list[Any]:
    """What the ranks answer. Raises MeetingFailed when one does not within MEETING_S, or fails."""
    futures.wait(answers, timeout=MEETING_S)
    silent = [rank for rank, answer in enumerate(answers) if not answer.done()]
    failed = [rank for rank, answer in enumerate(answers) if answer.done() and answer.exception()]
    if not failed and not silent:
        return [answer.result() for answer in answers]
    words = [f"{names[rank]}: {last_line(answers[rank].exception())}" for rank in failed]
    words += [f"{names[rank]}: no answer within {MEETING_S:g} s" for rank in silent]
    more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    raise MeetingFailed(f"not every rank {what}: {'; '.join(words[:SHOWN])}{more}")


def last_line(error: BaseException | None) -> str:
    """The line of an error, or of the traceback in it, that says it; torch has stacks behind it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(STACK)]
    return (told or lines or [type(error).__name__])[-1]


def compute(device: Callable[[], torch.device]) -> None:
    """Raises UnfitPlace unless this rank's device computes."""
    check_device(device())


def add_up(device: Callable[[], torch.device]) -> None:
    """Raises RuntimeError unless the sum over all ranks is right. Collective."""
    ranks = dist.get_world_size()
    values = torch.full((SIZE,), dist.get_rank() + 1.0, device=device())
    dist.all_reduce(values)
    expected = ranks * (ranks + 1) / 2
    if not bool((values == expected).all()):
        wrong = values[values != expected][0].item()
        raise RuntimeError(f"an all-reduce over {ranks} ranks gave {wrong:g}, not {expected:g}")


def place(address: str) -> str:
    """Name of this node for a sentence, and its address. Gloo gets the interface of the address,
    where it would take one that others do not reach: that of the node's name is loopback or none.
    """
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    if "GLOO_SOCKET_IFNAME" not in os.environ and not is_reachable(socket.gethostname()):
        for name, found in psutil.net_if_addrs().items():
            if any(each.address.partition("%")[0] == address for each in found):
                os.environ["GLOO_SOCKET_IFNAME"] = name
    return f"{node} ({address})"


def is_reachable(host: str) -> bool:
    """Whether a name resolves to an address of more than this machine."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return not all(str(each[4][0]).startswith(("127.", "::1")) for each in found)
