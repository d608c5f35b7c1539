"""Ranks meet: what is named when one cannot work, by real ranks where there are any."""

import os
import socket
from concurrent import futures
from functools import partial

import psutil
import pytest
import torch
import torch.distributed as dist

from cluster.trainer import meeting
from distill.testing import run_ranks

NAMES = [f"rank {rank} on n{rank} (10.0.0.{rank})" for rank in range(3)]
CPU = partial(torch.device, "cpu")


def sums(rank, world_size):
    """What each rank says of the sum: right, then with rank 1's part missing."""
    meeting.compute(CPU)
    meeting.add_up(CPU)
    reduce = dist.all_reduce

    def lossy(values):
        return reduce(values.mul_(0) if rank == 1 else values)

    dist.all_reduce = lossy
    try:
        meeting.add_up(CPU)
    except RuntimeError as error:
        return str(error)
    finally:
        dist.all_reduce = reduce
    return ""


def test_a_sum_that_is_wrong_is_seen(tmp_path):
    assert (
        run_ranks(sums, 2, tmp_path / "ranks") == ["an all-reduce over 2 ranks gave 1, not 3"] * 2
    )


def answer(outcome):
    found = futures.Future()
    if isinstance(outcome, Exception):
        found.set_exception(outcome)
    elif outcome is not None:
        found.set_result(outcome)
    return found


def test_ranks_that_fail_or_hang_are_named_with_their_nodes(monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_S", 0.05)
    assert meeting.hear("answers", NAMES, [answer(n) for n in (1, 2, 3)]) == [1, 2, 3]
    stack = "Exception raised from f at g.cc (most recent call first):\nframe #0: h + 0x1\n\n"
    error = RuntimeError(f"a traceback\nits device computes wrong: off by 4\n{stack}")
    with pytest.raises(meeting.MeetingFailed) as raised:
        meeting.hear("computes", NAMES, [answer(1), answer(error), answer(None)])
    assert str(raised.value) == (
        "not every rank computes: rank 1 on n1 (10.0.0.1): its device computes wrong: off by 4; "
        "rank 2 on n2 (10.0.0.2): no answer within 0.05 s"
    )
    asked = []

    def ask(rank, function, device):
        asked.append((rank, function))
        return answer(error if (rank, function) == (2, meeting.add_up) else 0)

    with pytest.raises(meeting.MeetingFailed, match=r"adds up with the others: rank 2 on n2"):
        meeting.meet(ask, NAMES, CPU)
    assert len(asked) == 6


def test_a_name_that_resolves_to_nothing_gives_gloo_the_interface_of_the_address(monkeypatch):
    for name in ("SLURMD_NODENAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # and put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    device, address = next(
        (name, each.address)
        for name, found in psutil.net_if_addrs().items()
        for each in found
        if each.family == socket.AF_INET
    )
    assert not meeting.is_reachable("no-such-host.invalid")
    assert not meeting.is_reachable("127.0.1.1") and meeting.is_reachable("10.1.2.3")
    assert meeting.place(address) == f"no-such-host.invalid ({address})"
    assert os.environ["GLOO_SOCKET_IFNAME"] == device
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    meeting.place(address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
