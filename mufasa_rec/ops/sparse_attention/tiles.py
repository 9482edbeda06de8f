"""Chunks of tiles: the runs that they read and write, and their masked logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.plan import TileGroup, all_full
from mufasa_rec.ops.sparse_attention.runs import add_runs, gather_runs, run_index

_CHUNK_ELEMENTS = 1 << 19  # logits of a chunk of tiles: 2 MB, within two cores' caches
LOG2E = 1.4426950408889634  # logits are kept in powers of two: exp2 is four times as fast as exp on a CPU


@dataclass(frozen=True)
class Runs:
    """The runs of a chunk of tiles: elements of queries `[C, G]` and of keys `[C, G, n]`, and what to hide."""

    tile: TileGroup
    queries: Tensor
    keys: Tensor
    hidden: Tensor | None


def chunks_of(tile_groups: list[TileGroup], q: Tensor, k: Tensor, layout: Layout, selected: Tensor) -> Iterator[Runs]:
    """Cut groups of tiles into chunks that fit the cache, and name the runs that they read."""
    groups, device = k.shape[1], q.device
    for group in tile_groups:
        size = max(1, _CHUNK_ELEMENTS // (group.rows * q.shape[1] * group.columns))
        for tile in group.split(size):
            keys = run_index(tile.keys.to(device), groups)[..., None]
            hidden = None
            if tile.num_blocks:
                blocks, hidden = _block_runs(tile, layout, selected)
                blocks = blocks * groups + torch.arange(groups, device=device)[:, None]
                keys = torch.cat([blocks, keys], dim=2) if tile.own_run else blocks
            if tile.num_before:
                steps = torch.arange(-tile.num_before, 0, device=device) * tile.length
                before = run_index(tile.queries.to(device), groups)[..., None] + steps * groups
                keys = torch.cat([before, keys.roll(1, dims=2)], dim=2)  # the own run second, between the two
            yield Runs(tile, run_index(tile.queries.to(device), groups), keys, hidden)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for itself, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _block_runs(tile: TileGroup, layout: Layout, selected: Tensor) -> tuple[Tensor, Tensor | None]:
    """First event of the run of each selected block, `[C, G, n]`, and what of the runs is not in the block.

    Runs are as long as the longest block; the part behind a shorter block is hidden.
    """
    always = int(layout.pattern.first_block)
    assert tile.tiles is not None
    chosen = selected.index_select(0, tile.tiles.to(selected.device))[..., : tile.num_blocks - always]
    place = torch.nn.functional.pad(chosen, (always, 0))
    blocks, device = layout.blocks, selected.device
    first = blocks.offsets[layout.tiles.sequence[tile.tiles]].to(device)
    block = first[:, None, None] + place
    begin = blocks.begin.to(device)[block]
    run = begin.clamp(max=layout.num_events - tile.length)
    if layout.plans.setdefault("full", all_full(layout)):
        return run, None
    end = blocks.end.to(device)[block]
    event = run[..., None] + torch.arange(tile.length, device=device)
    return run, ((event < begin[..., None]) | (event >= end[..., None])).flatten(2)


def masked_logits(q: Tensor, k: Tensor, runs: Runs) -> Tensor:
    """Logits of a chunk in powers of two, `[C * G, rows * R, columns]`, minus infinity where a query may not look."""
    logits = torch.bmm(q, k.transpose(1, 2))
    tile = runs.tile
    by_row = logits.view(len(logits), tile.rows, -1, tile.columns)
    for begin, end, added in tile.masks:
        by_row[..., begin:end] += added.to(logits.device)[:, None]
    if runs.hidden is not None:
        hidden = runs.hidden.flatten(0, 1)[:, None]
        logits[..., : hidden.shape[-1]].masked_fill_(hidden, float("-inf"))
    return logits


def take_queries(q: Tensor, k: Tensor, runs: Runs) -> Tensor:
    """Queries of a chunk, `[C * G, rows * R, D]`, scaled for logits in powers of two."""
    return take_rows(q, k.shape[1], runs).to(exact_dtype(q.dtype)).mul_(q.shape[-1] ** -0.5 * LOG2E)


def take_rows(rows: Tensor, groups: int, runs: Runs) -> Tensor:
    """Rows `[L, H, D]` of a chunk's queries, `[C * G, rows * R, D]`."""
    width = rows.shape[-1]
    taken = gather_runs(rows.reshape(len(rows), groups, -1), runs.queries, runs.tile.rows)
    return taken.view(len(taken), -1, width)


def add_rows(rows: Tensor, runs: Runs, change: Tensor) -> None:
    """Add `change [C * G, rows * R, D]` to the rows `[L, H, D]` of a chunk's queries."""
    groups = runs.queries.shape[1]
    by_group = rows.view(len(rows), groups, -1)
    add_runs(by_group, runs.queries, change.to(rows.dtype).view(len(change), runs.tile.rows, -1))


def take_keys(keys: Tensor, runs: Runs) -> Tensor:
    """Keys or values of a chunk, `[C * G, columns, D]`."""
    taken = gather_runs(keys, runs.keys, runs.tile.length).to(exact_dtype(keys.dtype))
    return taken.view(runs.queries.numel(), -1, keys.shape[-1])[:, : runs.tile.columns]


def add_keys(grads: Tensor, runs: Runs, change: Tensor) -> None:
    """Add `change [C * G, columns, D]` to the gradients of a chunk's keys or values."""
    length = runs.tile.length
    missing = runs.keys.shape[2] * length - change.shape[1]
    if missing:
        change = torch.nn.functional.pad(change, (0, 0, 0, missing))
    add_runs(grads, runs.keys, change.view(-1, length, grads.shape[-1]))
