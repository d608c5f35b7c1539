"""The allocator: what a process frees is there for its next allocation."""

import ctypes
import platform
import resource

import pytest
import torch

from distill.testing import run_ranks
from distill.training.memory import keep_freed_memory

M_MMAP_THRESHOLD = -3  # malloc.h


def faults_of_allocations(rank, world_size, num):
    """Page faults of making tensors of 16 and of 64 MiB `num` times: as mappings, and kept."""

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(num):
            [torch.ones(size << 18) for size in (16, 16, 64)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # glibc begins with mappings, and leaves those up to 32 MiB by what it happens to see freed
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
    found = [faults()]
    keep_freed_memory()
    faults()  # the first of them grows the heap
    return [*found, faults()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set for glibc alone")
def test_memory_that_was_freed_costs_no_page_faults_again(tmp_path):
    num = 20
    ((mapped, kept),) = run_ranks(faults_of_allocations, 1, tmp_path / "ranks", num)
    print(f"{mapped} page faults, {kept} with freed memory kept")
    assert mapped >= 3 * num  # a page each at least, however large the kernel's pages are
    assert kept < mapped / 10
