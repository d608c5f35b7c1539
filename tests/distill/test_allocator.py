"""The allocator: what a process frees is there for its next allocation."""

import platform
import resource

import pytest
import torch

from distill.allocator import keep_freed_memory
from distill.testing import run_ranks


def faults_of_allocations(rank, world_size, num):
    """Page faults of making four tensors of 16 MiB `num` times: as the system has it, and after."""

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(num):
            [torch.ones(4 * 2**20) for _ in range(4)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    found = [faults()]
    keep_freed_memory()
    faults()  # the first of them grows the heap
    return [*found, faults()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set for glibc alone")
def test_memory_that_was_freed_costs_no_page_faults_again(tmp_path):
    ((before, after),) = run_ranks(faults_of_allocations, 1, tmp_path / "ranks", 20)
    pages = 4 * 16 * 2**20 // resource.getpagesize()  # of one time
    assert before > 10 * pages and after < pages / 10
