"""The tiles of every branch of a batch, found once, in groups of equal shape so that matrix products run in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mufasa_rec.ops.jagged import positions, sequence_ids
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.tile_group import NOTHING, TileGroup, by_shape, edge_masks, rounded, spare_of


@dataclass(frozen=True)
class Plan:
    """The tiles of every branch."""

    window: list[TileGroup]
    selected: list[TileGroup]
    block: list[TileGroup]


def plan_tiles(layout: Layout) -> Plan:
    """Find the tiles of a batch."""
    return Plan(window_groups(layout), selected_groups(layout), block_groups(layout))


def all_full(layout: Layout) -> bool:
    """Whether every block that could be selected before a query's own is as long as a run."""
    inner = torch.ones(len(layout.blocks.begin), dtype=torch.bool)
    lasts = layout.blocks.offsets[1:] - 1
    inner[lasts[layout.blocks.offsets.diff() > 0]] = False
    length = (layout.blocks.end - layout.blocks.begin)[inner]
    return bool((length == layout.pattern.selection_block).all())


def window_groups(layout: Layout) -> list[TileGroup]:
    """Tiles of the window branch: each reads the one run of keys that its first and last query span."""
    window = layout.pattern.window
    size = 256 if window is None else min(64, max(8, 1 << (window // 4).bit_length() >> 1))
    begin, end, first = _cut(layout.offsets, torch.zeros_like(layout.offsets[1:]), size)
    keys = first if window is None else torch.maximum(first, begin - window)
    answered = end - begin
    rows_of = rounded(answered, size, layout.num_events - begin)
    groups = []
    for shape, members in by_shape(torch.stack([rows_of, rows_of + begin - keys], dim=1)):
        rows, columns = shape
        distance = torch.arange(rows)[:, None] + (columns - rows) - torch.arange(columns)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        spare = spare_of(answered[members], rows, answered[members] + (columns - rows), columns)
        masks = edge_masks(hidden)
        groups.append(TileGroup(rows, begin[members], keys[members], columns, columns, masks, spare=spare))
    return groups


def block_groups(layout: Layout) -> list[TileGroup]:
    """Tiles of the block branch: each reads its sequence's tokens from the first to the last that is complete."""
    size = min(512, max(32, 8 * layout.pattern.token_stride))
    tiles = _prefixes(layout.offsets, layout.visible_tokens, layout.tokens.offsets[:-1], size)
    whole = tiles.end - tiles.begin == size
    shapes = torch.unique(layout.visible_tokens[tiles.begin[whole][:, None] + torch.arange(size)], dim=0)
    alike = 2 * len(shapes) <= int(whole.sum())  # as blocks of a fixed length are; others would be a group each
    one_by_one = whole if alike else torch.zeros_like(whole)
    rest = torch.nonzero(~one_by_one).squeeze(1)
    return [
        *_equal_prefixes(tiles, torch.nonzero(one_by_one).squeeze(1), layout.visible_tokens),
        *_similar_prefixes(tiles, rest, layout.visible_tokens, size, layout.num_tokens),
    ]


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
    tiles = _prefixes(offsets, visible, first_key, size)
    return _equal_prefixes(tiles, torch.arange(len(tiles.begin)), visible)


@dataclass(frozen=True)
class _Prefixes:
    """Runs of queries, `begin` to `end`, and the first key of their sequences, each `[C]` int64."""

    begin: Tensor
    end: Tensor
    keys: Tensor


def _prefixes(offsets: Tensor, visible: Tensor, first_key: Tensor, size: int) -> _Prefixes:
    """Cut queries into tiles, without those that see nothing, which are the first of their sequences."""
    blind = torch.zeros(len(visible) + 1, dtype=torch.int64)
    blind[1:] = (visible == 0).cumsum(0)
    begin, end, first = _cut(offsets, blind[offsets[1:]] - blind[offsets[:-1]], size)
    return _Prefixes(begin, end, first_key[torch.searchsorted(offsets, first, right=True) - 1])


def _equal_prefixes(tiles: _Prefixes, which: Tensor, visible: Tensor) -> list[TileGroup]:
    """Groups of tiles whose queries see as much, one by one."""
    groups = []
    for (rows,), members in by_shape((tiles.end - tiles.begin)[which][:, None]):
        begin, keys = tiles.begin[which[members]], tiles.keys[which[members]]
        seen = visible[begin[:, None] + torch.arange(rows)]  # [C, rows]
        for shape, alike in by_shape(seen):
            columns = shape[-1]
            masks = edge_masks(torch.arange(columns) >= torch.tensor(shape)[:, None])
            groups.append(TileGroup(rows, begin[alike], keys[alike], columns, columns, masks))
    return groups


def _similar_prefixes(
    tiles: _Prefixes, which: Tensor, visible: Tensor, size: int, num_keys: int
) -> Iterator[TileGroup]:
    """Groups of tiles of about as many queries and keys, each with a mask of its own."""
    begin, keys, answered = tiles.begin[which], tiles.keys[which], (tiles.end - tiles.begin)[which]
    most = visible[tiles.end[which] - 1]
    rows_of = rounded(answered, size, len(visible) - begin)
    columns_of = rounded(most, 64, num_keys - keys)
    for (rows, columns), members in by_shape(torch.stack([rows_of, columns_of], dim=1)):
        seen, spare = visible[begin[members][:, None] + torch.arange(rows)], None
        if (found := spare_of(answered[members], rows, most[members], columns)) is not None:
            seen[found.rows], spare = columns, found  # a softmax over nothing would be NaN
        unseen = torch.zeros(*seen.shape, columns).masked_fill_(torch.arange(columns) >= seen[..., None], NOTHING)
        yield TileGroup(rows, begin[members], keys[members], columns, columns, (), spare=spare, unseen=unseen)


def selected_groups(layout: Layout) -> list[TileGroup]:
    """Tiles of the selected branch: each reads its selected blocks, then its own up to itself."""
    pattern, tiles, total = layout.pattern, layout.tiles, layout.num_events
    run = min(pattern.selection_block, total)
    own = layout.blocks.begin[tiles.block]
    reads_own = (tiles.place == 0) if pattern.first_block else torch.zeros_like(tiles.place, dtype=torch.bool)
    reads_own |= pattern.own_block
    num_blocks = num_selected_blocks(layout)
    keys = torch.where(num_blocks > 0, own.clamp(max=total - run), own)  # no run may leave the batch
    answered = tiles.end - tiles.begin
    rows_of = rounded(answered, pattern.tile, torch.minimum(total - tiles.begin, own + run - tiles.begin))
    shape = [num_blocks, rows_of, own - keys, tiles.begin + rows_of - own, reads_own.long()]
    groups = []
    for (blocks, rows, shift, upto, reads), members in by_shape(torch.stack(shape, dim=1)):
        length = run if blocks else upto
        columns = blocks * length + reads * (shift + upto)
        if not columns:
            continue
        place = torch.arange(columns) - blocks * length - shift  # in the own block; negative before it
        hidden = place > upto - rows + torch.arange(rows)[:, None]
        hidden |= (place < 0) & (place >= -shift)
        begin = tiles.begin[members]
        mine = answered[members] + (columns - rows) if reads else torch.full_like(members, columns)
        spare, masks = spare_of(answered[members], rows, mine, columns), edge_masks(hidden)
        group = TileGroup(rows, begin, keys[members], length, columns, masks, blocks, bool(reads), members, spare)
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
