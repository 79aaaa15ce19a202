"""Memory that a training step frees, kept for the next one."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
THREAD_HEAP = 2**26  # bytes: glibc's largest heap of a thread


def keep_freed_memory() -> None:
    """Let this process's malloc reuse large blocks and give none back to the system.

    By itself glibc maps each large activation anew in every step, and the system zeroes it page by page: a third of the
    time of a step at batch 768. Only where blocks come from changes. Other C libraries than glibc are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 2 * THREAD_HEAP)  # more than a thread's empty heap: it is not given back either
