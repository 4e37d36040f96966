"""Host memory that was freed: whether this process keeps it."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt (malloc.h)."""

_LARGEST_KEPT = 32 * 2**20
"""Bytes; the largest that glibc's threshold reaches by itself. Larger blocks go back to the system when freed."""


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for what comes next; nothing where the C library is another.

    A training step frees at its end what the next one asks for again. By default glibc gives the top of its heap back
    to the system then, and the next step gets it page by page, each cleared: 8 % of a step of 0.1 s on CPU
    (docs/performance.md). What a process holds is then the most that it ever used.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
