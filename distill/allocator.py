"""The C library's allocator, set for a process that needs the same memory again and again."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_POOLED = 32 << 20  # bytes; the most that glibc takes for M_MMAP_THRESHOLD
MOST_KEPT = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, for its next allocation of up to 32 MiB.

    A network's evaluation on a CPU frees its activations, glibc gives them back to the kernel, and
    the next evaluation faults every page in again: 5 to 25 % of the digits teacher's time, a chance
    of the process (docs/results.md). The peak of memory stays. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_POOLED)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
