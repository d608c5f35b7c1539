"""The C library's allocator, set for a process that needs the same memory again and again."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MOST_KEPT = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, for its next allocation.

    A network's evaluation on a CPU frees its activations, and a step of ZeRO its buffers of
    gradients. glibc gives them back to the kernel, large ones always and others by chance, and the
    next evaluation or step faults every page in again (numbers: docs/log.md). The peak of memory
    stays. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no allocation is a mapping, which ends with it
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
