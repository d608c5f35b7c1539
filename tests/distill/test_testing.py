"""The helper that runs several ranks: it joins them, and a failing one does not hang the others."""

import pytest
import torch
import torch.distributed as dist

from distill.testing import run_ranks


def add_up(rank, world_size, offset):
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return {"sum": value, "rank": rank}


def fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def test_ranks_meet_and_their_results_come_in_order(tmp_path):
    results = run_ranks(add_up, 2, tmp_path / "ranks", 10)
    assert [(r["rank"], float(r["sum"])) for r in results] == [(0, 21.0), (1, 21.0)]


def test_a_failing_rank_is_shown_and_ends_the_others(tmp_path):
    with pytest.raises(AssertionError, match="rank one is unwell"):
        run_ranks(fail_on_one, 2, tmp_path / "ranks")
