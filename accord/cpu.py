"""How a process that runs models uses the CPU."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER = 2**31 - 1


def use_cpu(threads: int) -> None:
    """torch on so many threads, in a process that keeps the memory it frees. For before a model is loaded."""
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Freed memory stays with the process, up to its peak, instead of going back to the kernel.

    A step of a model frees what the next one needs. By default glibc gives large blocks back each time, and
    the kernel then fills them with zeros again, page by page: a fifth of the time of a small model's step.
    False where there is no glibc; nothing changes there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1))
    taken = [mallopt(option, value) for option, value in options]
    return all(taken)
