"""The window and the selected branch at once, where they share keys and values: one list of keys for each tile.

The list is the window before the tile, the tile's own block, and the selected blocks. The own block stands in the
middle because both branches read it: the first columns are the window's, the last are the selected branch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.projected import SELECTED, WINDOW, Projected
from mufasa_rec.ops.sparse_attention.tiles import (
    LOG2E,
    Runs,
    add_keys,
    add_rows,
    masked_logits,
    take_keys,
    take_queries,
    take_rows,
)


def forward_fused(x: Projected, runs: Runs, partial: Tensor, lse: Tensor) -> None:
    """Attend from a chunk of tiles into `partial [3, L, H, D]` and `lse [3, L, H]`, which are zero there."""
    q, k, v = take_queries(x.q, x.k_window, runs), take_keys(x.k_window, runs), take_keys(x.v_window, runs)
    logits = masked_logits(q, k, runs)  # [C * G, rows * R, columns]
    window, selected, own = _columns(runs)
    peaks = [logits[..., columns].amax(-1, keepdim=True) for columns in (window, selected)]
    own_selected = (logits[..., own] - peaks[1]).exp2_()  # the branches may lie hundreds of nats apart
    for branch, columns, peak in ((WINDOW, window, peaks[0]), (SELECTED, selected, peaks[1])):
        weights = logits[..., columns]
        if branch == WINDOW:
            weights.sub_(peak).exp2_()
        else:
            logits[..., own.stop :].sub_(peak).exp2_()
            logits[..., own] = own_selected
        total = weights.sum(-1, keepdim=True)
        add_rows(partial[branch], runs, torch.bmm(weights, v[:, columns]).div_(total))
        add_rows(lse[branch, ..., None], runs, total.log2_().add_(peak))


def backward_fused(
    x: Projected, runs: Runs, rows: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Add a chunk's gradients to those of the queries, keys and values.

    Args:
        x: What is attended with.
        runs: The chunk.
        rows: Gradient of the output, `[L, H, D]`; and of the window branch, then the selected one, the gate, its
            gradient and the log-sum-exp, `[L, H, 6]`.
        targets: Gradients of queries, keys and values.
    """
    grad, numbers = (take_rows(t, x.groups, runs) for t in rows)
    grad = grad.to(numbers.dtype)
    q, k, v = take_queries(x.q, x.k_window, runs), take_keys(x.k_window, runs), take_keys(x.v_window, runs)
    logits, slope = masked_logits(q, k, runs), torch.bmm(grad, v.transpose(1, 2))
    gate, delta, lse, gate_selected, delta_selected, lse_selected = numbers.split(1, dim=-1)
    window, _, own = _columns(runs)
    later = slice(own.stop, None)
    own_weights = (logits[..., own] - lse_selected).exp2_().mul_(gate_selected)
    own_change = (slope[..., own] - delta_selected).mul_(own_weights)
    weights, change = logits, slope  # in place: each holds both branches' sum at last
    weights[..., window].sub_(lse).exp2_().mul_(gate)
    weights[..., later].sub_(lse_selected).exp2_().mul_(gate_selected)
    change[..., window].sub_(delta)
    change[..., later].sub_(delta_selected)
    change.mul_(weights)
    weights[..., own] += own_weights
    change[..., own] += own_change
    grad_q, grad_k, grad_v = targets
    add_keys(grad_v, runs, torch.bmm(weights.transpose(1, 2), grad))
    add_keys(grad_k, runs, torch.bmm(change.transpose(1, 2), q.div_(LOG2E)))
    add_rows(grad_q, runs, torch.bmm(change, k).mul_(x.q.shape[-1] ** -0.5))


def _columns(runs: Runs) -> tuple[slice, slice, slice]:
    """Columns of the window branch, of the selected branch, and of the own block, which is in both."""
    tile = runs.tile
    own = tile.num_before * tile.length
    return slice(0, own + tile.length), slice(own, tile.columns), slice(own, own + tile.length)
