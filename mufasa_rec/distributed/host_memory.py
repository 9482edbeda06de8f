"""How the C library keeps the memory of tensors on a CPU.

A step on a CPU frees hundreds of megabytes and asks for them again. glibc gives blocks of more than 32 MB back to the
system, which clears them page by page when they are next touched: a tenth to a sixth of a step of sparse attention over
65,536 events. PyTorch's own tuning guide advises an allocator that keeps them; glibc does too when it is told.
"""

from __future__ import annotations

import ctypes
import sys

# From malloc.h; both thresholds are ints, in bytes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees for its own next use, up to its peak.

    The process then stays as large as it once was. Without effect outside glibc (macOS, musl), where another allocator
    was preloaded, and on memory that was asked for before.

    Returns:
        Whether the C library took it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(bool(mallopt(option, _LARGEST)) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
