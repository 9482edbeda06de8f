"""How often items were chosen close to one another, counted on the training split alone.

A pair counts where both events are inputs or targets of training and the later one is a target, so each pair of events
counts once however a user's events are cut into rows. Validation and test events lie in the same lists of events, but
behind the end of every training row: they are never reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mufasa_rec.data.collate import ragged_arange
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.parquet import RowGroup, RowGroupReader, RowGroupRef

_MERGE_AT = 1 << 23  # entries that wait to be merged: 128 MB


@dataclass(frozen=True, eq=False)
class Cooccurrence:
    """Pairs of different items, each once.

    Attributes:
        left: Item row of the smaller of a pair, int64 `[pairs]`.
        right: Item row of the larger, `[pairs]`.
        count: How often they were chosen within the window, int64 `[pairs]`.
        num_items: Size of the catalog.
    """

    left: np.ndarray
    right: np.ndarray
    count: np.ndarray
    num_items: int

    def ppmi(self, shift: float = 1.0) -> np.ndarray:
        """Positive pointwise mutual information of each pair, `max(0, log(c S / (c_i c_j)) - log shift)`, `[pairs]`.

        With `shift = k` its factorisation is what word2vec with k negatives does (Levy and Goldberg, 2014).

        Example:
            >>> pairs = Cooccurrence(np.array([0, 2]), np.array([1, 3]), np.array([4, 4]), 4)
            >>> (pairs.ppmi() / np.log(4)).round(6).tolist()
            [1.0, 1.0]
        """
        if not len(self.count):
            return np.zeros(0)
        weight = self.count.astype(np.float64)
        totals = np.bincount(self.left, weight, self.num_items) + np.bincount(self.right, weight, self.num_items)
        information = np.log(weight) + np.log(totals.sum()) - np.log(totals[self.left]) - np.log(totals[self.right])
        return np.maximum(information - np.log(shift), 0.0)


def count_pairs(groups: Sequence[RowGroupRef], catalog: ItemLookup, window: int) -> Cooccurrence:
    """Count pairs of items within a window of a user's training events.

    Memory is that of the distinct pairs, whatever the number of events.

    Args:
        groups: Row groups of the training part.
        catalog: Items of the data set.
        window: Most events from one to the other; 1 counts neighbours only.

    Raises:
        ValueError: For a window below 1, or an id that is no item.
    """
    if window < 1:
        raise ValueError(f"behaviour.window={window}: choose 1 or more events.")
    reader, size = RowGroupReader(("item",)), len(catalog)
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    for ref in groups:
        waiting.extend(_codes(reader.read(ref), catalog, window))
        if sum(map(len, waiting)) > _MERGE_AT:
            codes, counts = _merged(codes, counts, waiting)
            waiting = []
    codes, counts = _merged(codes, counts, waiting)
    return Cooccurrence(codes // size, codes % size, counts, size)


def _codes(group: RowGroup, catalog: ItemLookup, window: int) -> list[np.ndarray]:
    """Pairs of one row group as `smaller row * items + larger row`, an array for each distance."""
    begin = np.maximum(group.target_from, 1)
    lengths = np.maximum(group.history_end - begin, 0)
    position = np.repeat(begin, lengths) + ragged_arange(lengths)
    now = np.repeat(group.stream_start, lengths) + position
    found = []
    for distance in range(1, window + 1):
        inside = now[position >= distance]
        first = catalog.rows_of(group.columns["item"][inside - distance])
        second = catalog.rows_of(group.columns["item"][inside])
        other = first != second
        low, high = np.minimum(first, second)[other], np.maximum(first, second)[other]
        found.append(low.astype(np.int64) * len(catalog) + high)
    return found


def _merged(codes: np.ndarray, counts: np.ndarray, more: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Add codes that count once each."""
    everything = np.concatenate([codes, *more])
    weight = np.concatenate([counts, np.ones(len(everything) - len(codes), np.int64)])
    distinct, place = np.unique(everything, return_inverse=True)
    total = np.zeros(len(distinct), np.int64)
    np.add.at(total, place, weight)
    return distinct, total
