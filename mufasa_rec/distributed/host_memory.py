"""How the system and the C library keep the memory of tensors on a CPU.

A step on a CPU frees hundreds of megabytes and asks for them again. glibc gives blocks of more than 32 MB back to the
system, which clears them page by page when they are next touched: a tenth to a sixth of a step of sparse attention over
65,536 events. PyTorch's own tuning guide advises an allocator that keeps them; glibc does too when it is told.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

# From malloc.h; both thresholds are ints, in bytes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_MADV_COLLAPSE = 25  # Linux 6.1; not in Python's mmap
_WORTH_BYTES = 1 << 25  # smaller tensors stay in the processor's caches of pages anyhow


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


def use_large_pages(tensor: Tensor) -> bool:
    """Move a large tensor's memory into large pages, where the system lets a process ask for them.

    Rows of a table are read here and there. With pages of 4 KiB nearly each of them costs a walk through the page
    tables besides; with pages of 2 MiB 65,536 rows of a gigabyte were read in two thirds of the time. Moving takes
    about three seconds a gigabyte, once. The numbers stay as they are.

    Args:
        tensor: Contiguous memory of a CPU.

    Returns:
        Whether the system took it. False also for small tensors, other systems, and kernels before Linux 6.1 where
        memory that was touched before stays in small pages.
    """
    size = tensor.numel() * tensor.element_size()
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or size < _WORTH_BYTES:
        return False
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (tensor.data_ptr() + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return all(madvise(begin, whole, advice) == 0 for advice in (mmap.MADV_HUGEPAGE, _MADV_COLLAPSE))
