"""Batches of items for the fusion layer: genres in balance, half of each filled with mined neighbours across genres.

A batch is a function of (seed, step) alone and is that of all ranks, so it knows neither their number nor where a run
was interrupted. In a random batch the loss that aligns genres finds nothing to align: near duplicates are rare.
"""

from __future__ import annotations

import numpy as np

from mufasa_rec.data.items import Categorical
from mufasa_rec.data.randomness import generator

_STREAM = 11
_MAX_ROUNDS = 8


class ItemSampler:
    """See the module docstring.

    Args:
        rows: Item rows to draw from, int64 `[n]`, each once.
        weights: Chance of each, as `genre_weights` gives it, `[n]`.
        neighbours: Pairs of these rows that belong into one batch, int64 `[pairs, 2]`; there may be none.
        batch_size: Items of a batch of all ranks; with fewer items each batch is all of them.
        seed: Seed of the run.

    Raises:
        ValueError: Without items.

    Example:
        >>> sampler = ItemSampler(np.arange(10), np.ones(10), np.array([[0, 9]]), 8, seed=3)
        >>> batch = sampler.batch(5)
        >>> len(np.unique(batch)), {0, 9} <= set(batch.tolist()), bool((batch == sampler.batch(5)).all())
        (8, True, True)
    """

    def __init__(
        self, rows: np.ndarray, weights: np.ndarray, neighbours: np.ndarray, batch_size: int, seed: int
    ) -> None:
        if not len(rows):
            raise ValueError("items: none to train on; the data set needs items that have content vectors.")
        self.rows, self.seed = rows, seed
        self.batch_size = min(batch_size, len(rows))
        self.steps_per_epoch = -(-len(rows) // self.batch_size)
        self._cumulative = np.cumsum(weights / weights.sum())
        self._first, self._pairs = _by_first(neighbours, rows)
        own = weights[self._first] if len(self._first) else np.zeros(0)
        self._pair_cumulative = np.cumsum(own / own.sum()) if len(own) else own

    def batch(self, step: int) -> np.ndarray:
        """Item rows of a step, each once, in random order, int64 `[batch_size]`."""
        draws = generator(self.seed, step, _STREAM)
        chosen = self._distinct(self._mined(draws))[: self.batch_size // 2]
        for _ in range(_MAX_ROUNDS):
            if len(chosen) == self.batch_size:
                break
            place = np.searchsorted(self._cumulative, draws.random(2 * self.batch_size), side="right")
            more = self.rows[np.minimum(place, len(self.rows) - 1)]
            chosen = self._distinct(np.r_[chosen, more])[: self.batch_size]
        if len(chosen) < self.batch_size:  # few items, or some of them hardly ever drawn
            left = np.setdiff1d(self.rows, chosen)
            chosen = np.r_[chosen, draws.permutation(left)[: self.batch_size - len(chosen)]]
        return draws.permutation(chosen)

    def _mined(self, draws: np.random.Generator) -> np.ndarray:
        """Items and one neighbour of each, one after the other."""
        if not len(self._first):
            return np.zeros(0, np.int64)
        place = np.searchsorted(self._pair_cumulative, draws.random(self.batch_size // 2), side="right")
        place = np.minimum(place, len(self._first) - 1)
        own = self.rows[self._first[place]]
        low, high = self._pairs[0][place], self._pairs[0][place + 1]
        other = self._pairs[1][low + (draws.random(len(place)) * (high - low)).astype(np.int64)]
        return np.stack([own, other], axis=1).reshape(-1)

    def _distinct(self, rows: np.ndarray) -> np.ndarray:
        """Each once, in the order of the first."""
        return rows[np.sort(np.unique(rows, return_index=True)[1])]


def _by_first(neighbours: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Places in `rows` of items with neighbours, and where each one's neighbours lie end to end; both ways."""
    both = np.concatenate([neighbours.reshape(-1, 2), neighbours.reshape(-1, 2)[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    owner, start = np.unique(both[:, 0], return_index=True)
    order = np.argsort(rows, kind="stable")
    place = order[np.searchsorted(rows, owner, sorter=order)] if len(owner) else owner
    return place, (np.r_[start, len(both)], both[:, 1])


def genre_weights(genres: Categorical | None, rows: np.ndarray) -> np.ndarray:
    """Chances that bring genres into balance: each genre's items share one part, an item has the mean of its genres.

    Args:
        genres: Genres of all items; None where there are none.
        rows: Item rows, `[n]`.

    Returns:
        Weights, `[n]`; items without a genre share one part too.

    Example:
        >>> genres = Categorical(values=np.array([1, 1, 2], dtype=np.int32), offsets=None, cardinality=2)
        >>> genre_weights(genres, np.arange(3)).tolist()
        [0.5, 0.5, 1.0]
    """
    if genres is None:
        return np.ones(len(rows))
    ids, lengths = genres_of(genres, rows)
    lengths = np.maximum(lengths, 1)
    full = np.zeros(lengths.sum(), np.int64)  # 0: none
    has = np.repeat(genres_of(genres, rows)[1] > 0, lengths)
    full[has] = ids
    share = 1.0 / np.maximum(np.bincount(full, minlength=genres.cardinality + 1), 1)
    starts = np.cumsum(lengths) - lengths
    return np.add.reduceat(share[full], starts) / lengths


def genres_of(genres: Categorical, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Genre codes of items end to end, int64, without the code 0 of a missing one, and their number, `[n]` int64."""
    if genres.offsets is None:
        ids, lengths = genres.values[rows], np.ones(len(rows), np.int64)
    else:
        lengths = (genres.offsets[rows + 1] - genres.offsets[rows]).astype(np.int64)
        place = np.repeat(genres.offsets[rows] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        ids = genres.values[place]
    owner = np.repeat(np.arange(len(rows)), lengths)[ids > 0]
    return ids[ids > 0].astype(np.int64), np.bincount(owner, minlength=len(rows)).astype(np.int64)
