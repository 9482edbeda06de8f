"""The catalog as the fusion layer reads it: contents, genres and behaviour of any item rows, and mined neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mufasa_rec.data.collaborative import CollaborativeVectors
from mufasa_rec.data.content import ContentStore
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.item_sampler import genres_of
from mufasa_rec.data.items import Categorical
from mufasa_rec.modules.fusion import ItemContent
from mufasa_rec.modules.fusion_batch import Behaviour
from mufasa_rec.modules.fusion_losses import cosines, genre_members

_EQUAL = 1 - 1e-4  # equal titles are near duplicates whatever the threshold, as in `semantic_loss`
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class FusionItems:
    """See the module docstring.

    Attributes:
        catalog: Items and their content.
        genres: Genres of all items; None where there are none.
        vectors: Collaborative vectors, for `collaborative.kind='vectors'`.
        pairs: Co-behaviour pairs as `smaller row * items + larger row`, ascending, for `'pairs'`.
        device: Where batches go.
    """

    catalog: ItemLookup
    genres: Categorical | None
    vectors: CollaborativeVectors | None = None
    pairs: np.ndarray | None = None
    device: torch.device | str = "cpu"

    def content(self, rows: np.ndarray) -> ItemContent:
        """Contents and genres of item rows `[n]`."""
        vectors, present = {}, {}
        for name, store in self.catalog.stores.items():
            place = self.catalog.content_rows[name][rows]
            vectors[name] = _read(store, place).to(self.device)
            present[name] = torch.from_numpy(place >= 0).to(self.device)
        ids, lengths = np.zeros(0, np.int64), np.zeros(len(rows), np.int64)
        if self.genres is not None:
            ids, lengths = genres_of(self.genres, rows)
        genres, genre_lengths = (torch.from_numpy(array).to(self.device) for array in (ids, lengths))
        return ItemContent(content=vectors, present=present, genres=genres, genre_lengths=genre_lengths)

    def behaviour(self, batch: np.ndarray, start: int, stop: int) -> Behaviour:
        """What the training split says of a rank's part of a batch.

        Args:
            batch: Item rows of all ranks, `[N]`.
            start: First of this rank's.
            stop: Behind the last.

        Returns:
            Events, vectors and pairs. Of a pair of two ranks' items the second place counts from this rank's first
            item too, so it may lie outside of its own.
        """
        rows = batch[start:stop]
        num_events = self.catalog.counts[rows].astype(np.int64)
        vectors = pairs = None
        if self.vectors is not None:
            found, num_events = self.vectors.of(np.asarray(self.catalog.items.ids)[rows])
            vectors = torch.from_numpy(found).to(self.device)
        if self.pairs is not None:
            pairs = torch.from_numpy(self._pairs(batch, start, stop)).to(self.device)
        events = torch.from_numpy(np.ascontiguousarray(num_events)).to(self.device)
        return Behaviour(num_events=events, vectors=vectors, pairs=pairs)

    def _pairs(self, batch: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Pairs of one of this rank's items and a later one of the batch, by place from `start`, `[pairs, 2]`."""
        assert self.pairs is not None
        if not len(self.pairs):
            return np.zeros((0, 2), np.int64)
        own = batch[start:stop, None]
        codes = np.minimum(own, batch) * len(self.catalog) + np.maximum(own, batch)
        place = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        later = np.arange(len(batch)) > np.arange(start, stop)[:, None]
        left, right = np.nonzero((self.pairs[place] == codes) & later)
        return np.stack([left, right - start], axis=1)

    def has_content(self) -> np.ndarray:
        """Item rows that have any modality, ascending, int64 `[n]`."""
        has = np.zeros(len(self.catalog), bool)
        for rows in self.catalog.content_rows.values():
            has |= rows[:] >= 0
        return np.flatnonzero(has)


def _read(store: ContentStore, place: np.ndarray) -> torch.Tensor:
    """Vectors of rows of a store, -1 where there is none, float32 `[n, P]`.

    Neighbours, as the encoding of a catalog asks for, are read as they lie: several times as fast as gathering, and
    without pages of the map that would fill the memory.
    """
    first = int(place[0]) if len(place) else -1
    if first >= 0 and (np.diff(place) == 1).all():
        return torch.from_numpy(store.copied(first, first + len(place)))
    return torch.from_numpy(store.gather(place))


def titles_of(items: FusionItems, rows: np.ndarray, anchor: str, max_items: int) -> tuple[np.ndarray, torch.Tensor]:
    """Those of some rows that have a title, evenly thinned to at most `max_items`, and their titles `[n, P]`."""
    rows = rows[items.catalog.content_rows[anchor][rows] >= 0]
    if len(rows) > max_items:
        rows = rows[np.linspace(0, len(rows) - 1, max_items).round().astype(np.int64)]
    store = items.catalog.stores[anchor]
    return rows, torch.from_numpy(store.gather(items.catalog.content_rows[anchor][rows]))


def mine_neighbours(items: FusionItems, rows: np.ndarray, titles: torch.Tensor, threshold: float) -> np.ndarray:
    """Pairs of items of different genres whose titles say nearly the same; it costs `n^2` cosines, in blocks.

    Args:
        items: The catalog.
        rows: Item rows that have a title, `[n]`.
        titles: Their titles, `[n, P]`.
        threshold: Cosine above which titles are near.

    Returns:
        Item rows, int64 `[pairs, 2]`, each pair once.
    """
    if items.genres is None or not len(rows):
        return np.zeros((0, 2), np.int64)
    ids, lengths = (torch.from_numpy(array) for array in genres_of(items.genres, rows))
    has, found = genre_members(ids, lengths).float(), []
    known = has.any(1)  # as `in_other_genres`, block by block
    for start in range(0, len(rows), _BLOCK):
        stop = min(start + _BLOCK, len(rows))
        near = cosines(titles[start:stop], titles[start:]) > min(threshold, _EQUAL)
        across = (has[start:stop] @ has[start:].T == 0) & known[start:stop, None] & known[start:]
        left, right = (near & across).nonzero().unbind(1)
        later = right > left
        found.append(torch.stack([left[later] + start, right[later] + start], dim=1))
    return rows[torch.cat(found).numpy()]
