"""Tiles of equal shape, found once per batch, so that matrix products run in batches without any padding.

Each branch is attention from runs of queries to runs of keys. Tiles with as many queries and as many key columns, and
the same mask, form a group, whichever sequences they lie in. What no tile of a group may see is cut off by a mask on
the few columns where it differs between its queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mufasa_rec.ops.jagged import positions, sequence_ids
from mufasa_rec.ops.sparse_attention.layout import Layout

_NOTHING = float("-inf")


@dataclass(frozen=True)
class TileGroup:
    """Tiles of one shape.

    Attributes:
        rows: Queries of a tile.
        queries: First query of each tile, `[C]` int64.
        keys: First row of each tile's own run of keys, `[C]` int64.
        length: Rows of a run of keys.
        columns: Key columns: those of the selected blocks, then of the own run as far as the tile reads it.
        masks: What to add to the logits of columns `begin` to `end`: `(begin, end, [rows, end - begin])`.
        num_blocks: Selected blocks before the own run; 0 outside the selected branch.
        own_run: Whether there is an own run.
        num_before: Runs before the tile that are read ahead of all others; 0 but in fused tiles.
        tiles: Each tile's row in the selection, `[C]` int64; None outside the selected branch.
    """

    rows: int
    queries: Tensor
    keys: Tensor
    length: int
    columns: int
    masks: tuple[tuple[int, int, Tensor], ...]
    num_blocks: int = 0
    own_run: bool = True
    num_before: int = 0
    tiles: Tensor | None = None

    def split(self, size: int) -> list[TileGroup]:
        """The group in parts of at most `size` tiles."""
        if len(self.queries) <= size:
            return [self]
        queries, keys = self.queries.split(size), self.keys.split(size)
        tiles = [None] * len(queries) if self.tiles is None else self.tiles.split(size)
        return [replace(self, queries=q, keys=k, tiles=t) for q, k, t in zip(queries, keys, tiles)]


@dataclass(frozen=True)
class Plan:
    """The tiles of every branch; fused tiles are those of the window and the selected branch at once."""

    window: list[TileGroup]
    selected: list[TileGroup]
    block: list[TileGroup]
    fused: list[TileGroup]


def plan_tiles(layout: Layout, *, fuse: bool) -> Plan:
    """Find the tiles of a batch.

    Args:
        layout: The batch's blocks.
        fuse: Whether the window and the selected branch read the same keys and values. Then a whole block of queries
            reads its window, itself and its selected blocks as one list of keys: a fifteenth fewer products.
    """
    pattern, tiles = layout.pattern, layout.tiles
    block = pattern.selection_block
    window = pattern.window or 1
    fits = fuse and pattern.window_branch and pattern.selected_branch and pattern.own_block and all_full(layout)
    if not fits or pattern.tile != block or window % block:
        return Plan(window_groups(layout), selected_groups(layout), block_groups(layout), [])
    fused = (tiles.end - tiles.begin == block) & (tiles.begin - layout.offsets[tiles.sequence] >= window)
    apart = torch.nonzero(~fused).squeeze(1)
    cut = tiles.begin[apart], tiles.end[apart], layout.offsets[tiles.sequence[apart]]
    together = fused_groups(layout, torch.nonzero(fused).squeeze(1))
    return Plan(window_groups(layout, cut), selected_groups(layout, apart), block_groups(layout), together)


def fused_groups(layout: Layout, members: Tensor) -> list[TileGroup]:
    """Tiles of whole blocks that read the window before them, themselves, and their selected blocks."""
    pattern, tiles, groups = layout.pattern, layout.tiles, []
    block, before = pattern.selection_block, (pattern.window or 0) // pattern.selection_block
    later = torch.arange(block)[:, None] < torch.arange(block)
    too_old, future = (torch.zeros(block, block).masked_fill(hidden, _NOTHING) for hidden in (~later, later))
    own = before * block
    masks = (0, block, too_old), (own, own + block, future)
    for (count,), alike in _by_shape(num_selected_blocks(layout)[members][:, None]):
        chosen = members[alike]
        begin, columns = tiles.begin[chosen], (before + 1 + count) * block
        groups.append(TileGroup(block, begin, begin, block, columns, masks, count, True, before, chosen))
    return groups


def all_full(layout: Layout) -> bool:
    """Whether every block that could be selected before a query's own is as long as a run."""
    inner = torch.ones(len(layout.blocks.begin), dtype=torch.bool)
    lasts = layout.blocks.offsets[1:] - 1
    inner[lasts[layout.blocks.offsets.diff() > 0]] = False
    length = (layout.blocks.end - layout.blocks.begin)[inner]
    return bool((length == layout.pattern.selection_block).all())


def window_groups(layout: Layout, cut: tuple[Tensor, Tensor, Tensor] | None = None) -> list[TileGroup]:
    """Tiles of the window branch: each reads the one run of keys that its first and last query span.

    Args:
        layout: The batch's blocks.
        cut: First query of each tile, query after its last, and first event of its sequence; None for all queries.
    """
    window = layout.pattern.window
    size = 256 if window is None else min(64, max(8, 1 << (window // 4).bit_length() >> 1))
    begin, end, first = _cut(layout.offsets, torch.zeros_like(layout.offsets[1:]), size) if cut is None else cut
    keys = first if window is None else torch.maximum(first, begin - window)
    groups = []
    for shape, members in _by_shape(torch.stack([end - begin, end - keys], dim=1)):
        rows, columns = shape
        distance = torch.arange(rows)[:, None] + (columns - rows) - torch.arange(columns)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        groups.append(TileGroup(rows, begin[members], keys[members], columns, columns, _masks(hidden)))
    return groups


def block_groups(layout: Layout) -> list[TileGroup]:
    """Tiles of the block branch: each reads its sequence's tokens from the first to the last that is complete."""
    size = min(512, max(32, 8 * layout.pattern.token_stride))
    return prefix_groups(layout.offsets, layout.visible_tokens, layout.tokens.offsets[:-1], size)


def prefix_groups(offsets: Tensor, visible: Tensor, first_key: Tensor, size: int) -> list[TileGroup]:
    """Tiles of queries that each see a prefix of their sequence's keys.

    Args:
        offsets: Offsets of the sequences of queries, `[B + 1]` int64.
        visible: How many keys each query sees, never falling within a sequence, `[L]` int64.
        first_key: First key of each sequence, `[B]` int64.
        size: Most queries of a tile.

    Returns:
        The groups; queries that see nothing are in none.
    """
    blind = torch.zeros(len(visible) + 1, dtype=torch.int64)
    blind[1:] = (visible == 0).cumsum(0)
    begin, end, first = _cut(offsets, blind[offsets[1:]] - blind[offsets[:-1]], size)
    owner = torch.searchsorted(offsets, first, right=True) - 1
    groups = []
    for (rows,), members in _by_shape((end - begin)[:, None]):
        seen = visible[begin[members][:, None] + torch.arange(rows)]  # [C, rows]
        for shape, alike in _by_shape(seen):
            chosen, columns = members[alike], shape[-1]
            hidden = torch.arange(columns) >= torch.tensor(shape)[:, None]
            keys = first_key[owner[chosen]]
            groups.append(TileGroup(rows, begin[chosen], keys, columns, columns, _masks(hidden)))
    return groups


def selected_groups(layout: Layout, which: Tensor | None = None) -> list[TileGroup]:
    """Tiles of the selected branch (`which`, or all): each reads its selected blocks, then its own up to itself."""
    pattern, tiles, total = layout.pattern, layout.tiles, layout.num_events
    run = min(pattern.selection_block, total)
    own = layout.blocks.begin[tiles.block]
    reads_own = (tiles.place == 0) if pattern.first_block else torch.zeros_like(tiles.place, dtype=torch.bool)
    reads_own |= pattern.own_block
    num_blocks = num_selected_blocks(layout)
    keys = torch.where(num_blocks > 0, own.clamp(max=total - run), own)  # no run may leave the batch
    shape = [num_blocks, tiles.end - tiles.begin, own - keys, tiles.end - own, reads_own.long()]
    groups = []
    which = torch.arange(len(own)) if which is None else which
    for (blocks, rows, shift, upto, reads), alike in _by_shape(torch.stack(shape, dim=1)[which]):
        members = which[alike]
        length = run if blocks else upto
        columns = blocks * length + reads * (shift + upto)
        if not columns:
            continue
        place = torch.arange(columns) - blocks * length - shift  # in the own block; negative before it
        hidden = place > upto - rows + torch.arange(rows)[:, None]
        hidden |= (place < 0) & (place >= -shift)
        begin = tiles.begin[members]
        masks = _masks(hidden)
        group = TileGroup(rows, begin, keys[members], length, columns, masks, blocks, bool(reads), 0, members)
        groups.append(group)
    return groups


def num_selected_blocks(layout: Layout) -> Tensor:
    """How many blocks besides its own each tile reads, `[N]` int64."""
    pattern, place = layout.pattern, layout.tiles.place
    always = int(pattern.first_block)
    return place.clamp(max=always) + (place - always).clamp(min=0, max=pattern.num_scored)


def _cut(offsets: Tensor, skip: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut sequences, without their first `skip [B]` rows, into tiles: begin, end, and begin of the sequence."""
    begin, end = offsets[:-1] + skip, offsets[1:]
    per_sequence = torch.cat([begin.new_zeros(1), ((end - begin + size - 1) // size).cumsum(0)])
    num_tiles = int(per_sequence[-1])
    owner = sequence_ids(per_sequence, num_tiles)
    start = begin[owner] + positions(per_sequence, num_tiles) * size
    return start, torch.minimum(start + size, end[owner]), offsets[owner]


def _by_shape(shapes: Tensor) -> list[tuple[list[int], Tensor]]:
    """Distinct rows of `shapes [N, s]`, each with the indices that have it."""
    if not len(shapes):
        return []
    distinct, which = torch.unique(shapes, dim=0, return_inverse=True)
    order = torch.argsort(which, stable=True)
    members = order.split(torch.bincount(which, minlength=len(distinct)).tolist())
    return list(zip(distinct.tolist(), members, strict=True))


def _masks(hidden: Tensor) -> tuple[tuple[int, int, Tensor], ...]:
    """Additive masks of the columns that some query may not see: those before and after the longest free run."""
    columns = hidden.shape[1]
    partly = torch.nonzero(hidden.any(0)).squeeze(1)
    if not len(partly):
        return ()
    edges = torch.cat([partly.new_tensor([-1]), partly, partly.new_tensor([columns])])
    widest = int(edges.diff().argmax())
    parts = ((int(partly[0]), int(edges[widest]) + 1), (int(edges[widest + 1]), int(partly[-1]) + 1))
    added = torch.zeros(hidden.shape).masked_fill(hidden, _NOTHING)
    return tuple((a, b, added[:, a:b].clone()) for a, b in parts if a < b)
