"""Pooling of events into block tokens: a learned convex combination with intra-block positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.runs import add_runs, gather_runs, run_index

_CHUNK_ELEMENTS = 1 << 19


def pool_blocks(
    rows: Tensor, layout: Layout, *, logits: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Pool the keys or values of each token block.

    Args:
        rows: Keys (before rotary positions) or values of the events, `[L, G, D]`.
        layout: The batch's blocks.
        logits: Weight of each place inside a block, up to a softmax over the places that the block has,
            `[block, G]`; None for the mean.
        positions: Added to the row at each place inside a block, `[block, G, D]`; or None.

    Returns:
        One row for each token block, `[K, G, D]`.

    Raises:
        ValueError: When `logits` or `positions` are not made for the pattern's block.

    Example:
        >>> from mufasa_rec.ops.sparse_attention.layout import plan_layout
        >>> from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
        >>> layout = plan_layout(torch.tensor([0, 5]), SparsePattern(block=2, window=4))
        >>> pool_blocks(torch.arange(5.0).view(5, 1, 1), layout).flatten().tolist()
        [0.5, 2.5]
    """
    block, groups = layout.pattern.block, rows.shape[1]
    for name, given in (("logits", logits), ("positions", positions)):
        if given is not None and given.shape[:2] != (block, groups):
            raise ValueError(f"{name}: shape {tuple(given.shape)}, expected it to begin with ({block}, {groups}).")
    weights = rows.new_ones(block, groups) if logits is None else (logits - logits.amax(0)).exp().to(rows.dtype)
    lengths = (layout.tokens.end - layout.tokens.begin).to(rows.device)
    last = lengths - 1
    total = weights.cumsum(0).index_select(0, last)  # [K, G]
    pooled = _SumRuns.apply(rows, weights, layout)
    if positions is not None:
        moved = (weights[..., None] * positions.to(rows.dtype)).cumsum(0)
        pooled = pooled + moved.index_select(0, last)
    return pooled / total[..., None]


class _SumRuns(torch.autograd.Function):
    """Weighted sums over the events of each block, chunk by chunk so that gathered events stay in the cache."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, layout: Layout) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weights)
        ctx.layout = layout
        out = rows.new_empty(layout.num_tokens, *rows.shape[1:])
        for part, begin, length in _chunks(rows, layout):
            runs = gather_runs(rows, run_index(begin, rows.shape[1]), length)  # [c * G, n, D]
            scale = weights[:length].t().repeat(len(begin), 1)[:, None]
            out[part] = torch.bmm(scale, runs).view(len(begin), *rows.shape[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        rows, weights = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)
        grad_weights = torch.zeros_like(weights)
        groups, width = rows.shape[1:]
        for part, begin, length in _chunks(rows, ctx.layout):
            index = run_index(begin, groups)
            mine = grad[part].reshape(-1, 1, width)  # [c * G, 1, D]
            add_runs(grad_rows, index, weights[:length].t().repeat(len(begin), 1)[..., None] * mine)
            runs = gather_runs(rows, index, length)
            product = torch.bmm(runs, mine.transpose(1, 2)).view(len(begin), groups, length)
            grad_weights[:length] += product.sum(0).t()
        return grad_rows, grad_weights, None


def _chunks(rows: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor, int]]:
    """Tokens of one length, their first events and the length, a cacheful at a time."""
    lengths = layout.tokens.end - layout.tokens.begin
    found = []
    for length in lengths.unique().tolist():
        members = torch.nonzero(lengths == length).squeeze(1)
        size = max(1, _CHUNK_ELEMENTS // (length * rows.shape[1] * rows.shape[2]))
        for part in members.split(size):
            found.append((part.to(rows.device), layout.tokens.begin[part].to(rows.device), length))
    return found
