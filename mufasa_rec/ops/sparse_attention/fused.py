"""The window and the selected branch at once, where they share keys and values: one list of keys for each tile.

The list is the window before the tile, the tile's own block, and the selected blocks. The own block stands in the
middle because both branches read it: the first columns are the window's, the last are the selected branch's. Functions
are those of `chunk`, with two gates and two log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.tiles import LOG2E, Head, Runs


def forward_chunk(
    head: Head, runs: Runs, taken: tuple[Tensor, Tensor, Tensor], gates: Sequence[Tensor], out: Tensor
) -> list[Tensor]:
    """Attend."""
    q, k, v = taken
    logits = head.logits(q, k, runs)
    window, own, later = _columns(logits, runs)
    peaks = [window.amax(-1, keepdim=True), torch.maximum(own.amax(-1, keepdim=True), later.amax(-1, keepdim=True))]
    own_selected = (own - peaks[1]).exp2_()  # the branches may lie hundreds of nats apart
    weights = [window.sub_(peaks[0]).exp2_(), later.sub_(peaks[1]).exp2_()]
    totals = [part.sum(-1, keepdim=True) for part in weights]
    totals[1] += own_selected.sum(-1, keepdim=True)
    for part, gate, total in zip(weights, gates, totals):
        part.mul_(gate / total)
    own.addcmul_(own_selected, gates[1] / totals[1])
    torch.bmm(logits, v, out=out)
    return [total.log2_().add_(peak) for total, peak in zip(totals, peaks)]


def backward_chunk(
    head: Head,
    runs: Runs,
    taken: tuple[Tensor, Tensor, Tensor, Tensor],
    numbers: tuple[Sequence[Tensor], Sequence[Tensor]],
    out: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Find the gradients."""
    (q, k, v, grad), (gates, lses) = taken, numbers
    logits, change = head.logits(q, k, runs), head.product("change", grad, v.transpose(1, 2))
    window, own, later = _columns(logits, runs)
    changes, own_change = _columns(change, runs)[::2], _columns(change, runs)[1]
    own_weights = (own - lses[1]).exp2_()
    own_selected = own_change * own_weights
    weights = [window.sub_(lses[0]).exp2_(), later.sub_(lses[1]).exp2_()]
    means = [part.mul_(weight).sum(-1, keepdim=True) for part, weight in zip(changes, weights)]
    means[1] += own_selected.sum(-1, keepdim=True)
    for part, weight, mean, gate in zip(changes, weights, means, gates):
        part.addcmul_(weight, mean, value=-1).mul_(gate)
        weight.mul_(gate)
    own_selected.addcmul_(own_weights, means[1], value=-1)
    own.addcmul_(own_weights, gates[1])
    own_change.addcmul_(own_selected, gates[1])
    torch.bmm(change, k, out=out)
    by_k = head.product("k", change.transpose(1, 2), q * (1 / LOG2E))
    return by_k, head.product("v", logits.transpose(1, 2), grad), means


def _columns(logits: Tensor, runs: Runs) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the window branch, of the own block, which is in both, and of the selected branch alone."""
    tile = runs.tile
    own = tile.num_before * tile.length
    end = own + tile.length
    return logits[..., :end], logits[..., own:end], logits[..., end:]
