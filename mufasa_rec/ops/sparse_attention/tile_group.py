"""Tiles of equal shape, so that matrix products run in batches.

Each branch is attention from runs of queries to runs of keys. Tiles with as many queries and as many key columns, and
the same mask, form a group, whichever sequences they lie in. What no tile of a group may see is cut off by a mask on
the few columns where it differs between its queries.

The last tile of a sequence is a shorter one. A group for each length would be hundreds of small products, so they are
rounded up to a few lengths by rows that follow in the batch. Those rows are cleared when they are read and when results
are added, so that nothing of another sequence, not even a NaN, gets anywhere. A cleared query has logits of 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

NOTHING = float("-inf")


@dataclass(frozen=True)
class Spare:
    """What rounds tiles up.

    Attributes:
        rows: Queries that a tile does not answer for, `[C, rows]` bool.
        keys: Columns that it may not read, `[C, columns]` bool.
    """

    rows: Tensor
    keys: Tensor


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
        tiles: Each tile's row in the selection, `[C]` int64; None outside the selected branch.
        spare: What of the tiles was added to make them as large as the group; None where nothing was.
        unseen: What to add to the logits of each tile, `[C, rows, columns]`; None where `masks` say it for all tiles.
    """

    rows: int
    queries: Tensor
    keys: Tensor
    length: int
    columns: int
    masks: tuple[tuple[int, int, Tensor], ...]
    num_blocks: int = 0
    own_run: bool = True
    tiles: Tensor | None = None
    spare: Spare | None = None
    unseen: Tensor | None = None

    def split(self, size: int) -> list[TileGroup]:
        """The group, which has nothing to spare, in parts of at most `size` tiles."""
        assert self.spare is None and self.unseen is None
        if len(self.queries) <= size:
            return [self]
        queries, keys = self.queries.split(size), self.keys.split(size)
        tiles = [None] * len(queries) if self.tiles is None else self.tiles.split(size)
        return [replace(self, queries=q, keys=k, tiles=t) for q, k, t in zip(queries, keys, tiles)]


def rounded(counts: Tensor, size: int, room: Tensor) -> Tensor:
    """Rows of tiles after rounding: a quarter of `size`, but 8 at least, at a time; as they were where room is short.

    Example:
        >>> rounded(torch.tensor([3, 17, 64, 20]), 64, torch.tensor([100, 100, 100, 25])).tolist()
        [16, 32, 64, 20]
    """
    step = max(1, min(size, max(8, size // 4)))
    up = (counts + step - 1).div(step, rounding_mode="floor") * step
    return torch.where(up <= room, up, counts)


def spare_of(answered: Tensor, rows: int, readable: Tensor, columns: int) -> Spare | None:
    """What of tiles of `rows` and `columns` is spare.

    Args:
        answered: Queries that each tile answers for, its first ones, `[C]` int64.
        rows: Queries of the shape.
        readable: Columns that each tile may read, its first ones, `[C]` int64.
        columns: Columns of the shape.
    """
    idle, foreign = torch.arange(rows) >= answered[:, None], torch.arange(columns) >= readable[:, None]
    return Spare(idle, foreign) if bool(idle.any()) or bool(foreign.any()) else None


def by_shape(shapes: Tensor) -> list[tuple[list[int], Tensor]]:
    """Distinct rows of `shapes [N, s]`, each with the indices that have it."""
    if not len(shapes):
        return []
    distinct, which = torch.unique(shapes, dim=0, return_inverse=True)
    order = torch.argsort(which, stable=True)
    members = order.split(torch.bincount(which, minlength=len(distinct)).tolist())
    return list(zip(distinct.tolist(), members, strict=True))


def edge_masks(hidden: Tensor) -> tuple[tuple[int, int, Tensor], ...]:
    """Additive masks of the columns that some query may not see: those before and after the longest free run."""
    columns = hidden.shape[1]
    partly = torch.nonzero(hidden.any(0)).squeeze(1)
    if not len(partly):
        return ()
    edges = torch.cat([partly.new_tensor([-1]), partly, partly.new_tensor([columns])])
    widest = int(edges.diff().argmax())
    parts = ((int(partly[0]), int(edges[widest]) + 1), (int(edges[widest + 1]), int(partly[-1]) + 1))
    added = torch.zeros(hidden.shape).masked_fill(hidden, NOTHING)
    return tuple((a, b, added[:, a:b].clone()) for a, b in parts if a < b)
