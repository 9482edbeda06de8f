"""Random inputs of sparse attention, and the way from events to attended values that a layer would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.api import Backend, attend_and_select
from mufasa_rec.ops.sparse_attention.layout import Layout, plan_layout
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern, ablate
from mufasa_rec.ops.sparse_attention.pooling import pool_blocks
from mufasa_rec.ops.sparse_attention.projected import Projected
from mufasa_rec.ops.sparse_attention.segments import coherence_borders, timegap_borders
from tests.tensors import leaf, offsets_of

WIDTH, WINDOW, BLOCK = 8, 20, 8
BASE = SparsePattern(window=WINDOW, block=BLOCK, num_selected=4)
PATTERNS = {
    "tiles of a block": BASE,
    "window of whole blocks": replace(BASE, window=2 * BLOCK),
    "tiles of 2": replace(BASE, selection_stride=2),
    "no sharing": replace(BASE, selection_stride=1),
    "overlapping tokens": replace(BASE, block=4, stride=2, selected_block=8),
    "tokens longer than selected blocks": replace(BASE, block=8, stride=4, selected_block=4, selection_stride=2),
    "no first block": replace(BASE, first_block=False),
    "no own block": replace(BASE, own_block=False, selection_stride=4),
    "block of one event": replace(BASE, block=1, window=3),
    "capped": replace(BASE, max_blocks=4).resolve(111),
    "timegap": replace(BASE, segmentation="timegap", min_block=3),
    "coherence": replace(BASE, segmentation="coherence", min_block=1, selection_stride=1),
    "window only": ablate(BASE, "window only"),
    "window and first block": ablate(BASE, "window and first block"),
    "no selected": ablate(BASE, "no selected"),
    "no block": ablate(BASE, "no block"),
    "full causal": ablate(BASE, "full causal"),
}
LENGTHS = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 63, 111, WINDOW - 1, WINDOW, WINDOW + 1]


def make_rows(rows: int, heads: int, groups: int, *, shared: bool = False, width: int = WIDTH) -> Projected:
    """Random projections of events or candidates, that collect gradients."""
    k, v = torch.randn(rows, groups, width), torch.randn(rows, groups, width)
    return as_leaves(
        Projected(
            q=torch.randn(rows, heads, width),
            q_block=torch.randn(rows, heads, width),
            k_window=k,
            v_window=v,
            k_selected=k if shared else torch.randn(rows, groups, width),
            v_selected=v if shared else torch.randn(rows, groups, width),
            gates=torch.rand(rows, heads, 3),
        )
    )


def as_leaves(x: Projected, dtype: torch.dtype | None = None) -> Projected:
    """Copies that collect gradients; what was shared stays shared."""
    copies = {name: leaf(tensor, dtype) for name, tensor in x.tensors().items()}
    if x.shared:
        copies |= {"k_selected": copies["k_window"], "v_selected": copies["v_window"]}
    return Projected(**copies)


def take(x: Projected, rows: Tensor | slice) -> Projected:
    """Some rows; what was shared stays shared."""
    taken = {name: tensor[rows] for name, tensor in x.tensors().items()}
    if x.shared:
        taken |= {"k_selected": taken["k_window"], "v_selected": taken["v_window"]}
    return Projected(**taken)


def random_times(rows: int) -> Tensor:
    """Times with a long pause before one event in five."""
    return torch.where(torch.rand(rows) < 0.2, 1000, 1).cumsum(0)


def make_layout(
    lengths: Sequence[int], pattern: SparsePattern, starts: Sequence[int] | None = None, times: Tensor | None = None
) -> Layout:
    """The blocks of a batch; segmentations by content take `times`."""
    offsets, borders = offsets_of(lengths), None
    bounds = {"shortest": pattern.shortest_block, "longest": pattern.block}
    times = random_times(sum(lengths)) if times is None else times
    if pattern.segmentation == "timegap":
        borders = timegap_borders(offsets, times, gap_ms=100, **bounds)
    if pattern.segmentation == "coherence":
        turn = torch.stack([times.cos(), times.sin()], dim=1)
        borders = coherence_borders(offsets, turn, cosine=0.5, **bounds)
    start = None if starts is None else torch.tensor(starts, dtype=torch.int64)
    return plan_layout(offsets, pattern, start_position=start, borders=borders)


def make_tokens(layout: Layout, groups: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Random keys and values of the blocks, that collect gradients."""
    k, v = torch.randn(2, layout.num_tokens, groups, width)
    return leaf(k), leaf(v)


def copies_of(tokens: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies that collect gradients."""
    return leaf(tokens[0], dtype), leaf(tokens[1], dtype)


def attend(x: Projected, layout: Layout, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Pool the blocks and attend, `[L, H, D]`; and the scored blocks."""
    k_block, v_block = (pool_blocks(rows, layout) for rows in (x.k_selected, x.v_selected))
    return attend_and_select(x, k_block, v_block, layout, backend=backend)
