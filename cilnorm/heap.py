"""Where the CPU's memory comes from."""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 32 * 2**20  # bytes; the most that every glibc takes


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, instead of handing it back to the kernel and asking for it again.

    The activations of a step are freed as the backward pass goes and wanted again in the next step; the kernel clears
    each page anew, which is up to a tenth of a step. The peak stays what it was. Does nothing without glibc.

    Returns:
        Whether the C library took it.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    return False
