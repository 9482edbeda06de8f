"""Scorers of the counted baselines."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mufasa_rec.evaluation.retrieval import Queries, Scorer
from mufasa_rec.models.baselines import Transitions


class PopularityScorer(Scorer):
    """Scores an item by its number of training events.

    Args:
        counts: Training events per item row, `[items]`.
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = torch.from_numpy(np.asarray(counts, dtype=np.float64))
        self.part = range(0)

    def prepare(self, part: range) -> None:
        """Remember the part."""
        self.part = part

    def scores(self, queries: Queries) -> Tensor:
        """Return the counts, the same for every query, `[Q, n]`."""
        mine = self.counts[self.part.start : self.part.stop].to(queries.user.device)
        return mine.expand(len(queries.user), -1).clone()


class MarkovScorer(PopularityScorer):
    """Scores an item by how often it directly followed the user's newest item; popularity decides between equals.

    Args:
        transitions: Counted over all ranks' training rows.
        counts: Training events per item row, `[items]`.
    """

    def __init__(self, transitions: Transitions, counts: np.ndarray) -> None:
        super().__init__(np.asarray(counts, dtype=np.float64) / (float(np.sum(counts)) + 1.0))
        self.transitions = transitions

    def prepare(self, part: range) -> None:
        """Keep the transitions into the part, by item before."""
        super().prepare(part)
        mine = self.transitions.part(part)
        self._after, self._count = torch.from_numpy(mine.after), torch.from_numpy(mine.count).double()
        self._starts = np.searchsorted(mine.before, np.arange(len(self.counts) + 1))

    def scores(self, queries: Queries) -> Tensor:
        """Return `count(newest -> item) + popularity share`, `[Q, n]`."""
        scores = super().scores(queries)
        last = queries.last_row.cpu().numpy()
        begin = np.where(last >= 0, self._starts[last], 0)
        size = np.where(last >= 0, self._starts[last + 1] - self._starts[last], 0)
        query = np.repeat(np.arange(len(last)), size)
        index = torch.from_numpy(np.repeat(begin - np.cumsum(size) + size, size) + np.arange(int(size.sum())))
        place = (torch.from_numpy(query), self._after[index] - self.part.start)
        place = tuple(x.to(scores.device) for x in place)
        scores.index_put_(place, self._count[index].to(scores.device), accumulate=True)
        return scores
