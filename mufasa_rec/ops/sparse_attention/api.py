"""Sparse attention from events and from candidates: checks at the boundary, then the path of the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.candidates import candidates_blocked
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.operator import remember, rows_of, sparse_attention_op
from mufasa_rec.ops.sparse_attention.projected import Projected
from mufasa_rec.ops.sparse_attention.reference import reference_attention, reference_candidates

Backend = Literal["reference", "blocked", "triton"]


def sparse_attention(
    x: Projected,
    k_block: Tensor,
    v_block: Tensor,
    layout: Layout,
    *,
    selected: Tensor | None = None,
    backend: Backend | None = None,
    check_values: bool = False,
) -> Tensor:
    """Attend from every event of a batch over its sequence's past, by window, selected blocks and block tokens.

    `o_t = sum over branches of gate * softmax attention`, the three branches of Native Sparse Attention (arXiv
    2502.11089) with sigmoid gates. Empty sequences, one-event sequences and batches without a block are welcome.

    Args:
        x: Queries, keys, values and gates of the events.
        k_block: Keys of the token blocks (`layout.tokens`), `[K, G, D]`; see `pooling.pool_blocks`.
        v_block: Values of the token blocks, `[K, G, D]`.
        layout: The batch's blocks, from `plan_layout`.
        selected: Scored blocks of each tile to use instead of choosing, `[N, G, S]` int64, from `selected_blocks`.
        backend: A path by name, for tests and benchmarks; None lets the device decide.
        check_values: Whether to look for NaN too, which waits for the device.

    Returns:
        Attended values, `[L, H, D]`, of the dtype of `x.q`.

    Raises:
        ValueError: When shapes, dtypes or values do not fit.

    Example:
        >>> from mufasa_rec.ops.sparse_attention.layout import plan_layout
        >>> from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
        >>> from mufasa_rec.ops.sparse_attention.pooling import pool_blocks
        >>> layout = plan_layout(torch.tensor([0, 5, 9]), SparsePattern(block=2, window=2, num_selected=3))
        >>> q, k, v = torch.randn(3, 9, 1, 4)
        >>> x = Projected(
        ...     q=q, q_block=q, k_window=k, v_window=v, k_selected=k, v_selected=v, gates=torch.ones(9, 1, 3)
        ... )
        >>> sparse_attention(x, pool_blocks(k, layout), pool_blocks(v, layout), layout).shape
        torch.Size([9, 1, 4])
    """
    return attend_and_select(
        x, k_block, v_block, layout, selected=selected, backend=backend, check_values=check_values
    )[0]


def attend_and_select(
    x: Projected,
    k_block: Tensor,
    v_block: Tensor,
    layout: Layout,
    *,
    selected: Tensor | None = None,
    backend: Backend | None = None,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `sparse_attention`, and the scored blocks of each tile besides.

    Returns:
        Attended values, `[L, H, D]`, and places of the scored blocks in their sequence, `[N, G, S]` int64, -1 where a
        tile has fewer; tiles in the order of `layout.tiles`.
    """
    _check_rows("x", x, layout.num_events)
    _check_tokens(x, k_block, v_block, layout)
    _check_selected(selected, x, layout)
    if check_values:
        _check_values({**_named("x", x), "k_block": k_block, "v_block": v_block})
    if _path(backend) == "reference":
        out, chosen = reference_attention(x, k_block, v_block, layout, selected)
        return _connected(out.to(x.q.dtype), x, k_block, v_block), chosen
    packed = remember(layout)
    tokens = k_block.contiguous(), v_block.contiguous()
    out, _, chosen = sparse_attention_op(rows_of(x), *tokens, packed, selected, x.shared)
    return out, chosen


def candidate_sparse_attention(
    candidates: Projected,
    x: Projected,
    k_block: Tensor,
    v_block: Tensor,
    owner: Tensor,
    layout: Layout,
    *,
    backend: Backend | None = None,
    check_values: bool = False,
) -> Tensor:
    """Attend from candidates, each as if it were the next event of its user, and seen by no other.

    A candidate's window are the last events with itself, its own block is the one that the next event would join (a
    new one after a full block), and it chooses among the others by its own scores: candidates never share a tile.

    Args:
        candidates: Queries, keys, values and gates of the candidates, `[C, ...]`.
        x: Those of the events; only the keys and values are read.
        k_block: Keys of the token blocks, `[K, G, D]`; a candidate reads all of its user's.
        v_block: Values of the token blocks, `[K, G, D]`.
        owner: User of each candidate, `[C]` int64.
        layout: The blocks of the events.
        backend: A path by name, for tests and benchmarks; None lets the device decide.
        check_values: Whether to look for NaN too, which waits for the device.

    Returns:
        Attended values, `[C, H, D]`, of the dtype of `x.q`.

    Raises:
        ValueError: When shapes, dtypes or values do not fit.
    """
    _check_rows("candidates", candidates, len(owner))
    _check_rows("x", x, layout.num_events)
    _check_tokens(x, k_block, v_block, layout)
    if candidates.q.shape[1:] != x.q.shape[1:] or candidates.groups != x.groups or candidates.q.dtype != x.q.dtype:
        raise ValueError(
            f"candidates.q: {candidates.q.dtype} {tuple(candidates.q.shape)}, but the events' is {x.q.dtype} "
            f"{tuple(x.q.shape)}; project both with the same layer."
        )
    if check_values:
        _check_values({**_named("x", x), **_named("candidates", candidates), "k_block": k_block, "v_block": v_block})
    if _path(backend) == "reference":
        out = reference_candidates(candidates, x, k_block, v_block, owner, layout).to(x.q.dtype)
    else:
        out = candidates_blocked(candidates, x, k_block, v_block, owner, layout)
    return _connected(_connected(out, x, k_block, v_block), candidates)


def _connected(out: Tensor, x: Projected, *more: Tensor) -> Tensor:
    """Values whose gradient reaches every input, also those of branches that are off: with zeros."""
    return out + sum(tensor[:0].sum() for tensor in (*x.tensors().values(), *more))


def _path(backend: Backend | None) -> str:
    """The path to take; until there are kernels for GPUs, tiles serve every device."""
    if backend == "triton":
        raise ValueError("backend='triton': there are no kernels yet; choose 'blocked', which runs on any device.")
    if backend not in (None, "reference", "blocked"):
        raise ValueError(f"backend={backend!r}: choose one of 'reference', 'blocked', 'triton' or None.")
    return backend or "blocked"


def _check_rows(owner: str, x: Projected, rows: int) -> None:
    """Check shapes and dtypes; reads no value."""
    if x.q.dim() != 3 or len(x.q) != rows:
        raise ValueError(f"{owner}.q: shape {tuple(x.q.shape)}, expected ({rows}, H, D): a query for each row.")
    if not x.q.is_floating_point():
        raise ValueError(f"{owner}.q: {x.q.dtype}; pass floating-point queries.")
    (_, heads, width), groups = x.q.shape, x.k_window.shape[1] if x.k_window.dim() == 3 else 0
    if groups < 1 or heads % groups:
        raise ValueError(
            f"{owner}.k_window: shape {tuple(x.k_window.shape)}; its heads must divide the {heads} query heads."
        )
    for name, tensor in x.tensors().items():
        shape = {"q": (heads, width), "q_block": (heads, width), "gates": (heads, 3)}.get(name, (groups, width))
        if tensor.shape != (rows, *shape):
            raise ValueError(f"{owner}.{name}: shape {tuple(tensor.shape)}, expected {(rows, *shape)}.")
        if tensor.dtype != x.q.dtype:
            raise ValueError(f"{owner}.{name}: {tensor.dtype}, but q is {x.q.dtype}; cast all to one dtype.")


def _check_tokens(x: Projected, k_block: Tensor, v_block: Tensor, layout: Layout) -> None:
    expected = (layout.num_tokens, x.groups, x.q.shape[-1])
    for name, tensor in (("k_block", k_block), ("v_block", v_block)):
        if tensor.shape != expected:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, expected {expected}: a row for each of layout.tokens."
            )
        if tensor.dtype != x.q.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, but q is {x.q.dtype}; cast all to one dtype.")


def _check_selected(selected: Tensor | None, x: Projected, layout: Layout) -> None:
    if selected is None:
        return
    expected = (len(layout.tiles.begin), x.groups, layout.pattern.num_scored)
    if selected.dtype != torch.int64 or selected.shape != expected:
        raise ValueError(f"selected: {selected.dtype} {tuple(selected.shape)}, expected int64 {expected}.")


def _named(owner: str, x: Projected) -> dict[str, Tensor]:
    return {f"{owner}.{name}": tensor for name, tensor in x.tensors().items()}


def _check_values(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: holds NaN or infinity; look for a diverged layer or an uninitialised input.")
