"""Which rows make up which batch: a function of (seed, epoch) alone, whatever the number of ranks and workers.

The row groups of a split are shuffled and laid on a line, the line is cut into as many equal parts as there are
*virtual readers*, and every global batch takes the same number of rows from each reader. Ranks and workers host
readers. Since every rank knows the whole plan from the row counts, all ranks know the number of steps and nobody waits
for a batch that never comes.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from mufasa_rec.data.randomness import generator


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of a row group, in the group's order of the epoch.

    Attributes:
        group: Index of the row group.
        start: First row.
        stop: One behind the last row.
    """

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class EpochOrder:
    """The plan of one epoch.

    Attributes:
        epoch: The epoch.
        readers: Slices of each virtual reader, in the order in which it reads them.
        rows_per_step: Rows that a global batch takes from each reader.
        num_steps: Steps of the epoch.
    """

    epoch: int
    readers: list[list[Slice]]
    rows_per_step: int
    num_steps: int

    @cached_property
    def ends(self) -> list[list[int]]:
        """Rows of each reader up to the end of each of its slices."""
        return [list(accumulate(piece.stop - piece.start for piece in reader)) for reader in self.readers]

    def pieces(self, reader: int, step: int) -> list[Slice]:
        """Slices that make up the rows of `reader` in `step`; none when it has no rows left."""
        first, last = step * self.rows_per_step, (step + 1) * self.rows_per_step
        slices, ends = self.readers[reader], self.ends[reader]
        found = []
        for place in range(bisect_right(ends, first), len(slices)):
            piece = slices[place]
            begin = ends[place] - (piece.stop - piece.start)
            if begin >= last:
                break
            stop = min(last, ends[place])
            found.append(Slice(piece.group, piece.start + max(first - begin, 0), piece.start + stop - begin))
        return found

    def num_rows(self, step: int) -> int:
        """Rows of the global batch of `step`."""
        before = step * self.rows_per_step
        return sum(min(max(ends[-1] - before, 0), self.rows_per_step) for ends in self.ends if ends)


def plan_epoch(
    group_rows: list[int], *, num_readers: int, rows_per_step: int, seed: int, epoch: int, shuffle: bool
) -> EpochOrder:
    """Deal the row groups of a split to the virtual readers.

    Args:
        group_rows: Rows of each row group.
        num_readers: Virtual readers.
        rows_per_step: Rows that a global batch takes from each reader.
        seed: Seed of the run.
        epoch: Epoch to plan.
        shuffle: Whether the groups are shuffled; evaluation keeps their order.

    Returns:
        The plan; readers differ by at most one row.

    Example:
        >>> order = plan_epoch([5, 3], num_readers=2, rows_per_step=3, seed=0, epoch=0, shuffle=False)
        >>> order.readers
        [[Slice(group=0, start=0, stop=4)], [Slice(group=0, start=4, stop=5), Slice(group=1, start=0, stop=3)]]
        >>> order.num_steps, order.num_rows(0), order.num_rows(1)
        (2, 6, 2)
    """
    order = np.arange(len(group_rows))
    if shuffle:
        order = generator(seed, epoch, 1).permutation(len(group_rows))
    ends = np.cumsum([group_rows[g] for g in order]) if len(order) else np.zeros(1, np.int64)
    total = int(ends[-1])
    borders = [total * r // num_readers for r in range(num_readers + 1)]
    readers = [_between(order, ends, group_rows, a, b) for a, b in zip(borders[:-1], borders[1:], strict=True)]
    longest = max(b - a for a, b in zip(borders[:-1], borders[1:], strict=True))
    return EpochOrder(epoch, readers, rows_per_step, -(-longest // rows_per_step))


def _between(order: np.ndarray, ends: np.ndarray, group_rows: list[int], first: int, last: int) -> list[Slice]:
    """Slices of the line of groups between two of its rows."""
    slices = []
    place = int(np.searchsorted(ends, first, side="right"))
    while first < last:
        group = int(order[place])
        begin = int(ends[place]) - group_rows[group]
        stop = min(last, int(ends[place]))
        if stop > first:
            slices.append(Slice(group, first - begin, stop - begin))
        first = stop
        place += 1
    return slices


def readers_of(rank: int, world_size: int, num_readers: int) -> range:
    """Virtual readers that a rank hosts: consecutive ones, so that ranks in order hold the global batch in order.

    Raises:
        ValueError: With fewer readers than ranks.
    """
    if num_readers < world_size:
        raise ValueError(
            f"data.num_readers={num_readers}: fewer than the {world_size} ranks, so some ranks would read nothing; "
            "raise data.num_readers (it changes the order of the data) or start fewer ranks."
        )
    return range(num_readers * rank // world_size, num_readers * (rank + 1) // world_size)
