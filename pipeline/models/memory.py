"""The memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import sys

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Makes this process reuse large blocks instead of giving them back to the kernel.

    Training on a CPU frees and asks for the same few megabytes in every layer. By default glibc unmaps
    blocks of 32 MB and more, and trims the heap's end, so the kernel clears fresh pages each time: on the
    demo's small models that was a third of the step. Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)
