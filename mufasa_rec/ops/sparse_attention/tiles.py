"""Chunks of tiles of some key/value heads: the runs that they read and write, and their masked logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mufasa_rec.ops import host_reads
from mufasa_rec.ops.sparse_attention.heads import Scratch, exact_dtype
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.plan import all_full
from mufasa_rec.ops.sparse_attention.runs import add_runs, gather_runs
from mufasa_rec.ops.sparse_attention.tile_group import NOTHING, TileGroup

_CHUNK_ELEMENTS = 1 << 18  # logits of a chunk of tiles: 1 MB, which stay in the cache
_PIECE_ELEMENTS = 1 << 22  # numbers of each kind that a piece of a group keeps for its rows
LOG2E = 1.4426950408889634  # logits are kept in powers of two: exp2 is four times as fast as exp on a CPU


@dataclass(frozen=True)
class Runs:
    """The runs of some tiles of one shape, as elements of `runs.gather_runs`.

    Attributes:
        tile: The shape of the tiles.
        queries: Each tile's queries, `[C]` int64; with several heads a tile counts once for each.
        keys: Each tile's runs of keys, `[C, n]` int64.
        hidden: What to add to the logits of columns, minus infinity outside a selected block that is shorter than a
            run, `[C, columns]`; None where all are full.
        idle: Queries that a tile does not answer for, `[C, rows]` bool; None where there are none.
        foreign: Columns that are not the tile's to read, those too, `[C, columns]` bool; None where there are none.
        unseen: What to add to the logits of each query, `[C, rows, columns]`; None where the tile's masks say it.
    """

    tile: TileGroup
    queries: Tensor
    keys: Tensor
    hidden: Tensor | None
    idle: Tensor | None = None
    foreign: Tensor | None = None
    unseen: Tensor | None = None

    @cached_property
    def idle_rows(self) -> Tensor | None:
        """Idle queries, counted through all tiles, as `_places` gives them."""
        return None if self.idle is None else _places(self.idle)

    @cached_property
    def foreign_columns(self) -> Tensor | None:
        """Foreign columns, counted through the columns of all tiles, as `_places` gives them."""
        return None if self.foreign is None else _places(self.foreign)

    @cached_property
    def foreign_rows(self) -> Tensor | None:
        """Foreign columns, counted through the rows of all tiles' runs, as `_places` gives them."""
        spare = self.keys.shape[1] * self.tile.length - self.tile.columns
        if self.foreign is None or not spare:
            return self.foreign_columns
        return _places(torch.nn.functional.pad(self.foreign, (0, spare)))

    def split(self, size: int) -> list[Runs]:
        """Chunks of at most `size` tiles."""
        if len(self.queries) <= size:
            return [self]
        queries, keys = self.queries.split(size), self.keys.split(size)
        optional = (self.hidden, self.idle, self.foreign, self.unseen)
        rest = ([None] * len(keys) if given is None else given.split(size) for given in optional)
        return [Runs(self.tile, *parts) for parts in zip(queries, keys, *rest)]


@dataclass(frozen=True)
class Heads:
    """Some key/value heads of a batch, neighbours, whose tiles go through the same products.

    Attributes:
        first: The first of them.
        count: How many they are, `h`.
        groups: How many there are in all.
        ratio: Query heads that read it, `R`.
        width: Their width, `D`.
        layout: The batch's blocks.
        selected: Scored blocks of all heads, `[N, G, S]`.
        scratch: Memory for a chunk.
    """

    first: int
    count: int
    groups: int
    ratio: int
    width: int
    layout: Layout
    selected: Tensor
    scratch: Scratch

    def chunk_size(self, tile: TileGroup) -> int:
        """How many tiles' logits fit the cache."""
        return max(1, _CHUNK_ELEMENTS // (tile.rows * self.ratio * tile.columns))

    def pieces(self, tile: TileGroup) -> list[Runs]:
        """The runs of a group of tiles, cut so that what is kept of their rows stays small beside the batch."""
        row = self.ratio * self.width
        return self.runs(tile).split(max(self.chunk_size(tile), _PIECE_ELEMENTS // (tile.rows * row)))

    def runs(self, tile: TileGroup) -> Runs:
        """The runs that a group of tiles reads and writes."""
        device, hidden = self.selected.device, None
        number = torch.arange(self.first, self.first + self.count, device=device)
        own = tile.keys.to(device)[:, None, None].expand(-1, self.count, 1)
        parts = [own] if tile.own_run else []
        if tile.num_blocks:
            mine = self.selected[:, self.first : self.first + self.count]
            blocks, hidden = _block_runs(tile, self.layout, mine)
            parts = [blocks, *parts]
        keys = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)) * self.groups + number[:, None]
        queries = tile.queries.to(device)[:, None] * self.groups + number
        idle, foreign = (
            (None, None)
            if tile.spare is None
            else (self._each(s.to(device)) for s in (tile.spare.rows, tile.spare.keys))
        )
        if hidden is not None:
            outside = torch.nn.functional.pad(hidden, (0, tile.columns - hidden.shape[-1])).flatten(0, 1)
            foreign = outside if foreign is None else foreign | outside
            hidden = torch.zeros(outside.shape, device=device).masked_fill_(outside, NOTHING)
        unseen = None if tile.unseen is None else self._each(tile.unseen.to(device))
        return Runs(tile, queries.flatten(), keys.flatten(0, 1), hidden, idle, foreign, unseen)

    def _each(self, of_tiles: Tensor) -> Tensor:
        """What holds for tiles `[C, ...]`, for each head's: `[C * h, ...]`."""
        return of_tiles[:, None].expand(-1, self.count, *of_tiles.shape[1:]).flatten(0, 1)

    def take_rows(self, name: str, rows: Tensor, runs: Runs) -> Tensor:
        """Rows `[L, H, D]` of the queries of tiles, `[C, rows * R, D]`, in the scratch memory of a name."""
        by_head = rows.view(len(rows), self.groups, -1)
        memory = self.scratch.empty(name, (len(runs.queries), runs.tile.rows, by_head.shape[-1]), rows)
        taken = _cleared(gather_runs(by_head, runs.queries, runs.tile.rows, memory), runs.idle_rows)
        return taken.view(len(taken), runs.tile.rows * self.ratio, -1).to(exact_dtype(rows.dtype))

    def rows_like(self, name: str, rows: Tensor) -> Tensor:
        """Uninitialised memory of the shape of taken rows."""
        return self.scratch.empty(name, tuple(rows.shape), rows)

    def add_rows(self, rows: Tensor, runs: Runs, change: Tensor) -> None:
        """Add `change [C, rows * R, D]` to the rows `[L, H, D]` of the queries of tiles."""
        by_head = rows.view(len(rows), self.groups, -1)
        add_runs(by_head, runs.queries, _cleared(change.view(len(change), runs.tile.rows, -1), runs.idle_rows))

    def take_keys(self, name: str, keys: Tensor, runs: Runs) -> Tensor:
        """Keys or values `[L, G, D]` of a chunk, `[C, columns, D]`, in the scratch memory of a name."""
        length, width = runs.tile.length, keys.shape[-1]
        memory = self.scratch.empty(name, (runs.keys.numel(), length, width), keys)
        taken = gather_runs(keys, runs.keys, length, memory).to(exact_dtype(keys.dtype))
        return _cleared(taken.view(len(runs.queries), -1, width), runs.foreign_rows)[:, : runs.tile.columns]

    def add_keys(self, grads: Tensor, runs: Runs, change: Tensor) -> None:
        """Add `change [C, columns, D]` to the gradients `[L, G, D]` of a chunk's keys or values."""
        length, change = runs.tile.length, _cleared(change, runs.foreign_columns)
        missing = runs.keys.shape[1] * length - change.shape[1]
        if missing:
            change = torch.nn.functional.pad(change, (0, 0, 0, missing))
        add_runs(grads, runs.keys, change.view(-1, length, grads.shape[-1]))

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Matrix products in the scratch memory of a name."""
        return torch.bmm(a, b, out=self.scratch.empty(name, (len(a), a.shape[1], b.shape[2]), a))

    def logits(self, q: Tensor, k: Tensor, runs: Runs) -> Tensor:
        """Logits of a chunk, `[C, rows * R, columns]`, minus infinity where a query may not look."""
        logits, tile = self.product("logits", q, k.transpose(1, 2)), runs.tile
        by_row = logits.view(len(logits), tile.rows, self.ratio, tile.columns)
        for begin, end, added in tile.masks:
            by_row[..., begin:end] += added.to(logits.device)[:, None]
        if runs.hidden is not None:
            logits += runs.hidden[:, None]
        if runs.unseen is not None:
            by_row += runs.unseen[:, :, None]
        return logits


def _places(which: Tensor) -> Tensor:
    """What is to be cleared: by index, as a mask takes thirty times as long; by a mask where counting would wait."""
    return torch.nonzero(which.flatten()).squeeze(1) if host_reads.free(which) else which.flatten()


def _cleared(rows: Tensor, which: Tensor | None) -> Tensor:
    """Rows `[C, n, D]` with zeros at `which`, from `_places`."""
    if which is None:
        return rows
    flat = rows.view(-1, rows.shape[-1])
    if which.dtype == torch.bool:
        flat.masked_fill_(which[:, None], 0.0)
    else:
        flat.index_fill_(0, which, 0.0)
    return rows


def _block_runs(tile: TileGroup, layout: Layout, selected: Tensor) -> tuple[Tensor, Tensor | None]:
    """First event of the run of each selected block, `[C, h, b]`, and what of the runs is not in the block.

    Runs are as long as the longest block; the part behind a shorter block is hidden.
    """
    always = int(layout.pattern.first_block)
    assert tile.tiles is not None
    chosen = selected.index_select(0, tile.tiles.to(selected.device))[..., : tile.num_blocks - always]
    place = torch.nn.functional.pad(chosen, (always, 0))
    blocks, device = layout.blocks, selected.device
    block = blocks.offsets[layout.tiles.sequence[tile.tiles]].to(device)[:, None, None] + place
    begin = blocks.begin.to(device)[block]
    run = begin.clamp(max=layout.num_events - tile.length)
    if _are_full(layout):
        return run, None
    end = blocks.end.to(device)[block]
    event = run[..., None] + torch.arange(tile.length, device=device)
    return run, ((event < begin[..., None]) | (event >= end[..., None])).flatten(2)


def _are_full(layout: Layout) -> bool:
    """Whether all blocks that can be selected are as long as a run; found once for a batch."""
    if "full" not in layout.plans:
        layout.plans["full"] = all_full(layout)
    return layout.plans["full"]
