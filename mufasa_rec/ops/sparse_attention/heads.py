"""Key/value heads in parts: a thread for each where there are several, and memory that its chunks share.

Nothing is shared between key/value heads. On a CPU a thread for each part scales better than many threads within each
of the small operations. A large batch takes its heads one by one, so that a chunk of one stays in the cache; the tiles
of a small batch are too few to fill a chunk, and each operation costs more than its arithmetic: there all the heads of
a thread go through the same operations.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 13  # events of the heads that are taken together
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


def parts_of(groups: int, num_events: int, device: torch.device) -> list[range]:
    """Key/value heads that are worked off together.

    Args:
        groups: Key/value heads.
        num_events: Events of the batch.
        device: Where the work is done; a GPU's launches cost most of all.

    Example:
        >>> parts_of(4, 1 << 20, torch.device("cpu"))
        [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    together = max(1, min(-(-groups // threads), _SMALL // max(num_events, 1)))
    return [range(first, min(first + together, groups)) for first in range(0, groups, together)]


def for_each_part(work: Callable[[range, Scratch], None], parts: list[range], device: torch.device) -> None:
    """Call `work` with each part of the heads, and memory; on a CPU in as many threads as PyTorch may use."""
    left, allowed = iter(parts), torch.get_num_threads()
    threads = min(len(parts), allowed)

    def take_parts() -> None:
        scratch = Scratch()
        for part in left:
            work(part, scratch)

    if device.type != "cpu" or threads == 1:
        take_parts()
        return
    inference = torch.is_inference_mode_enabled()

    def alone() -> None:
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():  # a new thread knows neither
            take_parts()

    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(alone) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(allowed)  # what threads that are yet to come inherit
