"""The arithmetic of a chunk of tiles: softmax attention of one branch, forward and backward.

Logits are in powers of two. A softmax's gradient needs, for each query, the mean of the weights' gradients by the
weights; this is the gradient of the branch's gate too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.tiles import Heads, Runs


def forward_chunk(heads: Heads, runs: Runs, taken: tuple[Tensor, Tensor, Tensor], gate: Tensor, out: Tensor) -> Tensor:
    """Attend.

    Args:
        heads: The heads.
        runs: The chunk.
        taken: Queries, scaled for logits in powers of two, `[C, rows * R, D]`; keys and values, `[C, columns, D]`.
        gate: The branch's gate, `[C, rows * R, 1]`.
        out: Where to write the attended values times the gate, `[C, rows * R, D]`.

    Returns:
        The branch's log-sum-exp, `[C, rows * R, 1]`.
    """
    q, k, v = taken
    logits = heads.logits(q, k, runs)
    peak = logits.amax(-1, keepdim=True)
    total = logits.sub_(peak).exp2_().sum(-1, keepdim=True)
    torch.bmm(logits, v, out=out).mul_(gate / total)
    return total.log2_().add_(peak)


def backward_chunk(
    heads: Heads,
    runs: Runs,
    taken: tuple[Tensor, Tensor, Tensor, Tensor],
    gated: tuple[Tensor, Tensor],
    numbers: tuple[Tensor, Tensor],
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the gradients.

    Args:
        heads: The heads.
        runs: The chunk.
        taken: Queries, keys and values as above, and the gradient of the gated values, `[C, rows * R, D]`.
        gated: Queries for logits in natural units, and that gradient, both times the gate, `[C, rows * R, D]`.
        numbers: The branch's gate, and its log-sum-exp, each `[C, rows * R, 1]`.
        out: Where to write the gradient of the queries, but for the scale of logits.

    Returns:
        Gradients of the keys and values, in the memory of those, and of the gate.
    """
    (q, k, v, grad), (gate, lse) = taken, numbers
    weights = heads.logits(q, k, runs).sub_(lse).exp2_()
    change = heads.product("change", grad, v.transpose(1, 2)).mul_(weights)
    mean = change.sum(-1, keepdim=True)
    change.addcmul_(weights, mean, value=-1)
    torch.bmm(change, k, out=out).mul_(gate)  # the gate scales rows: let the narrow side of each product bear it
    by_k = heads.product("k", change.transpose(1, 2), gated[0])
    return by_k, heads.product("v", weights.transpose(1, 2), gated[1]), mean
