"""What counted models count: the transitions of a first-order Markov chain. Beating them is the least one may ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mufasa_rec.data.batch import Batch


@dataclass(frozen=True)
class Transitions:
    """How often an item directly followed another among the training targets, sparse, sorted by (before, after).

    Attributes:
        before: Item row of the earlier event, `[n]`.
        after: Item row of the event that followed, `[n]`.
        count: How often, `[n]`.
    """

    before: np.ndarray
    after: np.ndarray
    count: np.ndarray

    @staticmethod
    def merge(parts: list[Transitions]) -> Transitions:
        """Add up counts of several parts, such as the ranks'."""
        if not parts:
            parts = [_nothing()]
        before, after, count = (np.concatenate([getattr(p, n) for p in parts]) for n in ("before", "after", "count"))
        return _summed(before, after, count)

    def part(self, rows: range) -> Transitions:
        """The transitions into the items `rows`."""
        keep = (self.after >= rows.start) & (self.after < rows.stop)
        return Transitions(self.before[keep], self.after[keep], self.count[keep])


def _summed(before: np.ndarray, after: np.ndarray, count: np.ndarray) -> Transitions:
    """Sum the counts of equal pairs."""
    order = np.lexsort((after, before))
    before, after, count = before[order], after[order], count[order]
    if not len(before):
        return Transitions(before, after, count)
    new = np.flatnonzero(np.r_[True, (np.diff(before) != 0) | (np.diff(after) != 0)])
    return Transitions(before[new], after[new], np.add.reduceat(count, new))


def count_transitions(batches: Iterable[Batch]) -> Transitions:
    """Count the transitions into the targets of training batches.

    Args:
        batches: Training batches; each event with a positive target weight is one transition, to the event after it.

    Returns:
        The counts, int64, each pair once.
    """
    parts = []
    for batch in batches:
        asked = batch.target_weight.numpy() > 0
        rows = batch.item_row.numpy()
        before, after = rows[batch.event_item.numpy()[asked]], rows[batch.next_item.numpy()[asked]]
        parts.append(_summed(before, after, np.ones(len(before), np.int64)))
    return Transitions.merge(parts)


def _nothing() -> Transitions:
    return Transitions(*(np.zeros(0, np.int64) for _ in range(3)))
