"""Key/value heads, one at a time: a thread for each where there are several, and memory that its chunks share.

Nothing is shared between key/value heads. On a CPU a thread for each head scales better than many threads within each
of the small operations.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_TOUCH = 128  # numbers from one touch to the next: any page has some, and there are enough for several threads


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for itself, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zeros(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros that the system clears as they are first touched, in large pages: NumPy asks for those, PyTorch does not.

    The results of a batch are hundreds of megabytes. To clear them in small pages by one thread took a sixth of a step;
    so did waiting for one another where the threads of two heads, whose rows alternate, touched a page first together.
    So every page is touched here, by PyTorch's threads.
    """
    if like.device.type != "cpu" or not like.numel():
        return torch.zeros(shape, dtype=dtype, device=like.device)
    found = torch.from_numpy(np.zeros(shape, dtype=np.float64 if dtype == torch.float64 else np.float32))
    found.view(-1)[::_TOUCH].zero_()
    return found


class Scratch:
    """Memory for what a chunk computes, used again by the next one.

    A fresh megabyte for each product may cost as much as the product: the allocator hands it back to the system when it
    is freed, and the system clears it page by page when it is next asked for.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory, valid until the name is next asked for."""
        size = torch.Size(shape).numel()
        kept = self._kept.get((name, like.dtype))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, like.dtype] = like.new_empty(size)
        return kept[:size].view(shape)


def for_each_head(work: Callable[[int, Scratch], None], groups: int, device: torch.device) -> None:
    """Call `work` with each key/value head, and memory; on a CPU in as many threads as PyTorch may use."""
    heads, allowed = iter(range(groups)), torch.get_num_threads()
    threads = min(groups, allowed)

    def take_heads() -> None:
        scratch = Scratch()
        for head in heads:
            work(head, scratch)

    if device.type != "cpu" or threads == 1:
        take_heads()
        return
    inference = torch.is_inference_mode_enabled()

    def alone() -> None:
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():  # a new thread knows neither
            take_heads()

    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(alone) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(allowed)  # what threads that are yet to come inherit
