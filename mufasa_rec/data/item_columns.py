"""What is known about every item without memory for every item: worked out for the rows that are asked for.

A catalog may have billions of items; a batch asks for thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_BLOCK = 64  # items that share one running count


class ItemColumn:
    """A column by item row whose values follow from the items' ids, resolved when they are read.

    Args:
        ids: Raw ids of all items, mapped, `[items]`.
        resolve: Gives the values of ids `[k]`, `[k, ...]`.

    Example:
        >>> column = ItemColumn(np.array([3, 5, 8]), lambda ids: ids * 10)
        >>> column[np.array([2, 0])], column[1], column[:].tolist()
        (array([80, 30]), 50, [30, 50, 80])
    """

    def __init__(self, ids: np.ndarray, resolve: Callable[[np.ndarray], np.ndarray]) -> None:
        self._ids, self._resolve = ids, resolve

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, rows: Any) -> Any:
        """Values of rows, of whatever shape NumPy's indexing gives; `[:]` costs memory for all items."""
        ids = np.asarray(self._ids[rows])
        found = self._resolve(ids.reshape(-1))
        found = found.reshape((*ids.shape, *found.shape[1:]))
        return found if found.ndim else found.item()


class ChosenItems:
    """Some of all items, found by their place among themselves in an eighth of a byte an item beside the flags.

    Args:
        flags: Which items are chosen, `[items]` bool; kept, not copied.

    Example:
        >>> chosen = ChosenItems(np.array([False, True, True, False, True]))
        >>> len(chosen), chosen.rows(np.array([2, 0])).tolist()
        (3, [4, 1])
    """

    def __init__(self, flags: np.ndarray) -> None:
        self.flags = flags
        starts = np.arange(0, len(flags), _BLOCK)
        counts = np.add.reduceat(flags, starts, dtype=np.int64) if len(starts) else starts
        self._before = np.r_[0, np.cumsum(counts)]  # chosen items before each block, and all of them

    def __len__(self) -> int:
        return int(self._before[-1])

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Item rows `[k]` of the chosen items at places `[k]`, counted from 0."""
        if len(self) == len(self.flags):
            return places
        block = np.searchsorted(self._before, places, side="right") - 1
        inside = block[:, None] * _BLOCK + np.arange(_BLOCK)
        flags = self.flags[np.minimum(inside, len(self.flags) - 1)] & (inside < len(self.flags))
        nth = np.cumsum(flags, axis=1, dtype=np.int64) > (places - self._before[block])[:, None]
        return block * _BLOCK + nth.argmax(axis=1)
