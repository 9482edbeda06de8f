"""Next-item softmax over many candidates without keeping the `[T, N]` scores.

The scores of 25,000 events against 4,000 items are 400 MB; written, read and written again by softmax and backward they
cost more than the matrix products. So both functions walk over chunks of queries that fit the cache and form the
gradients in the same pass (the loss is a weighted sum, so its gradient is known up to one factor before backward
begins).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 19  # scores of one chunk: 2 MB in fp32, within a core's caches
_LOG2E = 1.4426950408889634  # scores are kept in powers of two: exp2 is four times as fast as exp on a CPU


def full_softmax_loss(query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of cross-entropies over all items.

    Args:
        query: User states times inverse temperature, `[T, D]`.
        vectors: Vectors of all items that may be recommended, `[N, D]`.
        target: Row of `vectors` that is the positive of each query, `[T]` int64.
        weight: Weight of each query, `[T]`; it gets no gradient.

    Returns:
        The sum over queries of `weight * (logsumexp(scores) - positive score)`, a scalar in fp32; 0 without queries.

    Raises:
        ValueError: When the shapes do not fit together, or there are queries but no vectors.

    Example:
        >>> q, v = torch.randn(5, 4), torch.randn(7, 4)
        >>> t, w = torch.tensor([0, 3, 6, 1, 1]), torch.ones(5)
        >>> expected = torch.nn.functional.cross_entropy(q @ v.T, t, reduction="sum")
        >>> torch.allclose(full_softmax_loss(q, v, t, w), expected, atol=1e-5)
        True
    """
    _check_shapes(query, {"vectors": vectors}, {"target": target, "weight": weight})
    if len(query) and not len(vectors):
        raise ValueError(f"vectors: none for {len(query)} queries; a full softmax needs the items' vectors.")
    low = _low_precision(query.device.type)
    with torch.autocast(query.device.type, enabled=False):
        return _FullSoftmax.apply(query.float(), vectors.float(), target, weight.float(), low)


def sampled_softmax_loss(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    bias: Tensor,
    target_id: Tensor,
    candidate_id: Tensor,
    weight: Tensor,
) -> Tensor:
    """Weighted sum of cross-entropies of a positive among sampled negatives, log-Q corrected.

    The correction subtracts the log of the expected *number* of times an item is among the step's negatives, and from
    the negatives only: then `exp(positive) + sum of exp(negatives)` has the full softmax's partition sum as its mean.

    Args:
        query: User states times inverse temperature, `[T, D]`.
        positive: Vector of each query's positive, `[T, D]`.
        candidates: Vectors of the negatives, shared by all queries, `[N, D]`.
        bias: Added to each negative's score, `-log Q`, `[N]`; it gets no gradient.
        target_id: Item of each positive, `[T]` int64.
        candidate_id: Item of each negative, `[N]` int64; a negative equal to a query's positive is dropped for that
            query.
        weight: Weight of each query, `[T]`; it gets no gradient.

    Returns:
        The weighted sum, a scalar in fp32; a query all of whose negatives are dropped adds 0.

    Raises:
        ValueError: When the shapes do not fit together.

    Example:
        >>> q, p, n = torch.randn(5, 4), torch.randn(5, 4), torch.randn(3, 4)
        >>> bias, ids, ones = torch.tensor([0.1, 0.2, 0.3]), torch.arange(5), torch.ones(5)
        >>> loss = sampled_softmax_loss(q, p, n, bias, ids, torch.tensor([7, 8, 9]), ones)
        >>> scores = torch.cat([(q * p).sum(1, keepdim=True), q @ n.T + bias], dim=1)
        >>> torch.allclose(loss, -scores.log_softmax(1)[:, 0].sum(), atol=1e-5)
        True
    """
    _check_shapes(query, {"candidates": candidates}, {"positive": positive, "target_id": target_id, "weight": weight})
    _check_shapes(candidates, {"positive": positive}, {"bias": bias, "candidate_id": candidate_id})
    low = _low_precision(query.device.type)
    with torch.autocast(query.device.type, enabled=False):
        return _SampledSoftmax.apply(
            query.float(),
            positive.float(),
            candidates.float(),
            bias.float(),
            target_id,
            candidate_id,
            weight.float(),
            low,
        )


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor, low: bool) -> Tensor:
        want = any(ctx.needs_input_grad[:2])
        loss = query.new_zeros(())
        grads = (torch.empty_like(query), torch.zeros_like(vectors)) if want else None
        product = _gradient_product(query, vectors, low)
        for part in _chunks(len(query), len(vectors)):
            t, w = target[part], weight[part]
            scores = torch.mm(query[part] * _LOG2E, vectors.T)  # [c, N], in powers of two
            mine = scores.gather(1, t[:, None]).squeeze(1)
            peak = scores.amax(1)
            scores.sub_(peak[:, None]).exp2_()
            total = scores.sum(1)
            loss += (w * (total.log2() + peak - mine)).sum() / _LOG2E
            if grads is None:
                continue
            scores.mul_((w / total)[:, None])
            scores.scatter_add_(1, t[:, None], -w[:, None])
            product(scores, part, grads[0], grads[1])
        ctx.save_for_backward(*(grads or (None, None)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(g * grad for g in ctx.saved_tensors), None, None, None)


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  autograd sees tensors only as arguments of their own
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        candidates: Tensor,
        bias: Tensor,
        target_id: Tensor,
        candidate_id: Tensor,
        weight: Tensor,
        low: bool,
    ) -> Tensor:
        want = any(ctx.needs_input_grad[:3])
        loss = query.new_zeros(())
        grads = tuple(torch.zeros_like(x) for x in (query, positive, candidates)) if want else None
        product = _gradient_product(query, candidates, low)
        for part in _chunks(len(query), len(candidates)):
            q, p, w = query[part], positive[part], weight[part]
            mine = (q * p).sum(1) * _LOG2E
            scores = torch.addmm(bias * _LOG2E, q * _LOG2E, candidates.T)  # [c, N], in powers of two
            scores.masked_fill_(target_id[part][:, None] == candidate_id[None], float("-inf"))
            peak = torch.maximum(scores.amax(1), mine) if len(candidates) else mine
            scores.sub_(peak[:, None]).exp2_()
            own = (mine - peak).exp2()
            rest = scores.sum(1)
            total = rest + own
            loss += (w * (total.log2() + peak - mine)).sum() / _LOG2E
            if grads is None:
                continue
            scores.mul_((w / total)[:, None])
            pull = -w * rest / total  # own / total - 1, without losing the digits of a small rest
            product(scores, part, grads[0], grads[2])
            grads[0][part] += pull[:, None] * p
            grads[1][part] = pull[:, None] * q
        ctx.save_for_backward(*(grads or (None, None, None)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(g * grad for g in ctx.saved_tensors), None, None, None, None, None)


def _low_precision(device_type: str) -> bool:
    """Whether the caller runs under bf16 autocast."""
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.bfloat16


def _gradient_product(query: Tensor, vectors: Tensor, low: bool) -> Callable[[Tensor, slice, Tensor, Tensor], None]:
    """How a chunk's score gradient becomes those of queries and vectors: in bf16 under bf16 autocast, else fp32.

    The scores themselves are always fp32: in bf16 a score of 20 is rounded to steps of 1/8, which no softmax forgives.
    The two products of the backward tolerate it (0.2 % of the gradient's norm) and run 3 times as fast.
    """
    if not low:

        def exact(scores: Tensor, part: slice, grad_query: Tensor, grad_vectors: Tensor) -> None:
            torch.mm(scores, vectors, out=grad_query[part])
            grad_vectors.addmm_(scores.T, query[part])

        return exact
    rounded_query, rounded_vectors = query.bfloat16(), vectors.bfloat16()

    def rounded(scores: Tensor, part: slice, grad_query: Tensor, grad_vectors: Tensor) -> None:
        low_scores = scores.bfloat16()
        grad_query[part] = low_scores @ rounded_vectors
        grad_vectors.add_(low_scores.T @ rounded_query[part])

    return rounded


def _chunks(num_queries: int, num_candidates: int) -> list[slice]:
    """Slices of queries whose scores fit `_CHUNK_ELEMENTS`."""
    size = max(16, _CHUNK_ELEMENTS // max(1, num_candidates))
    return [slice(a, min(a + size, num_queries)) for a in range(0, num_queries, size)]


def _check_shapes(rows: Tensor, same_width: dict[str, Tensor], same_length: dict[str, Tensor]) -> None:
    """Check shapes against the `[n, D]` of `rows`: one D, one entry per row."""
    for name, tensor in same_width.items():
        if tensor.shape[1:] != rows.shape[1:]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} beside {tuple(rows.shape)}; the widths must agree.")
    for name, tensor in same_length.items():
        if len(tensor) != len(rows):
            raise ValueError(f"{name}: {len(tensor)} entries for {len(rows)} rows; give one for each.")
