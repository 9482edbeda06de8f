"""Full-catalog evaluation of anything that can score items for histories: a retriever, popularity, a Markov chain."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mufasa_rec.data.batch import Batch
from mufasa_rec.data.collate import Windows, collate
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.loader import Loader
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.evaluation.ranks import Ranked, catalog_part, gains, rank_among, rank_targets
from mufasa_rec.ops.jagged import last_index, lengths_of, sequence_ids


@dataclass(frozen=True)
class Queries:
    """The queries of one step, of all ranks, on every rank; `Q` users.

    Attributes:
        user: `[Q]`.
        target_row: `[Q]`.
        last_row: Item row of the newest event of the history, `[Q]`; -1 without history.
        history_length: Events before the target, `[Q]`.
        seen: Query and item row of every earlier event, each `[s]`.
        vectors: User vectors, `[Q, E]`; empty for scorers that need none.
    """

    user: Tensor
    target_row: Tensor
    last_row: Tensor
    history_length: Tensor
    seen: tuple[Tensor, Tensor]
    vectors: Tensor


class Scorer(abc.ABC):
    """Scores one part of the catalog for queries."""

    def user_vectors(self, batch: Batch) -> Tensor:
        """Return what the scorer needs of a batch's users, `[B, E]`; collective. Empty by default."""
        return torch.zeros(len(batch.user), 0, device=batch.user.device)

    @abc.abstractmethod
    def prepare(self, part: range) -> None:
        """Get ready to score the items of `part`; collective."""

    @abc.abstractmethod
    def scores(self, queries: Queries) -> Tensor:
        """Return the scores of the prepared part's items, `[Q, n]`."""


class RetrieverScorer(Scorer):
    """Scores by the dot product of a retriever's user and item vectors.

    Args:
        model: The sharded model in evaluation mode; its forward returns (loss, output with `user_vectors`,
            `item_vectors`).
        catalog: Items.
        exchange: Reaches the other ranks.
        device: Device of the model.
        chunk_items: Items that one forward embeds.
    """

    def __init__(
        self,
        model: nn.Module,
        catalog: ItemLookup,
        exchange: RankExchange,
        device: torch.device,
        *,
        columns: tuple[str, ...] = (),
        chunk_items: int = 8192,
    ) -> None:
        self.model, self.catalog, self.exchange, self.device = model, catalog, exchange, device
        self.columns, self.chunk_items = columns, chunk_items
        self.items = torch.zeros(0, 0)

    @torch.no_grad()
    def user_vectors(self, batch: Batch) -> Tensor:
        """Return unit user vectors `[B, E]`."""
        _, output = self.model(batch)
        return output.user_vectors

    @torch.no_grad()
    def prepare(self, part: range) -> None:
        """Embed the part's items, shard by shard: every rank looks up its own part, all ranks equally often."""
        longest = max(size for (size,) in self.exchange.counts([len(part)]))
        rows = np.arange(part.start, part.stop)
        vectors = []
        for start in range(0, longest, self.chunk_items):
            chunk = rows[start : start + self.chunk_items]
            batch = _items_batch(self.catalog, chunk, self.columns).to(self.device)
            _, output = self.model(batch)
            vectors.append(output.item_vectors.index_select(0, batch.candidate_item))
        self.items = torch.cat(vectors) if vectors else torch.zeros(0, 0)

    def scores(self, queries: Queries) -> Tensor:
        """Return cosines `[Q, n]`."""
        return queries.vectors @ self.items.T


def _items_batch(catalog: ItemLookup, rows: np.ndarray, columns: tuple[str, ...]) -> Batch:
    """A batch of candidates and one user without history."""
    zero, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
    windows = Windows(dict.fromkeys(("item", *columns), none), zero, zero, zero, zero, zero)
    return collate(windows, catalog, rows, np.zeros(len(rows), np.float32))


class Evaluator:
    """Ranks the targets of one part of a split.

    Args:
        loader: Evaluation batches of this rank.
        catalog: Items.
        exchange: Reaches the other ranks.
        device: Where scores are computed.
        mask_seen: Whether items that a user has seen are masked.
    """

    def __init__(
        self, loader: Loader, catalog: ItemLookup, exchange: RankExchange, device: torch.device, *, mask_seen: bool
    ) -> None:
        self.loader, self.catalog, self.exchange, self.device = loader, catalog, exchange, device
        self.mask_seen = mask_seen
        self.part = catalog_part(len(catalog), exchange.rank, exchange.world_size)

    @torch.no_grad()
    def rank(self, scorer: Scorer, after_batch: Callable[[], None] | None = None) -> Ranked:
        """Rank every target by a scorer; collective, the same result on every rank.

        Args:
            scorer: Scores the catalog.
            after_batch: Called after every batch, equally often on every rank; may end the ranking by raising.
        """
        scorer.prepare(self.part)
        cold = torch.from_numpy(self.catalog.counts == 0).to(self.device)
        found = []
        for queries in self._queries(scorer):
            seen = queries.seen if self.mask_seen else None
            scores, target = scorer.scores(queries), queries.target_row
            rank, top = rank_targets(scores, self.part, target, seen, self.exchange)
            cold_rank = rank_among(scores, self.part, target, cold, self.exchange)
            columns = (queries.user, target, rank, top, queries.history_length, cold_rank)
            found.append(Ranked(*(column.cpu().numpy() for column in columns)))
            if after_batch is not None:
                after_batch()
        return Ranked.concatenate(found)

    def metrics(self, scorer: Scorer, after_batch: Callable[[], None] | None = None) -> dict[str, float]:
        """Mean HR@10, NDCG@10 and MRR over all targets; see `rank`."""
        return {name: float(values.mean()) for name, values in gains(self.rank(scorer, after_batch).rank).items()}

    def _queries(self, scorer: Scorer) -> Iterator[Queries]:
        """Queries of every step, those of all ranks together."""
        for batch in self.loader.batches(0):
            batch = batch.to(self.device)
            vectors = scorer.user_vectors(batch)
            real = batch.num_rows
            lengths = lengths_of(batch.offsets)
            last = torch.full_like(lengths, -1)
            if batch.num_events:
                newest = batch.item_row[batch.event_item[last_index(batch.offsets)]]
                last = torch.where(lengths > 0, newest, last)
            seen_query = sequence_ids(batch.seen_offsets, len(batch.seen_row))
            counts = self.exchange.counts([real, len(batch.seen_row)])
            sizes, seen_sizes = ([count[i] for count in counts] for i in (0, 1))
            before = sum(sizes[: self.exchange.rank])
            columns = (batch.user, batch.target_row, last, lengths_of(batch.seen_offsets))
            gathered = [self.exchange.gather(column[:real], sizes) for column in columns]
            seen = tuple(self.exchange.gather(x, seen_sizes) for x in (seen_query + before, batch.seen_row))
            yield Queries(*gathered, seen=(seen[0], seen[1]), vectors=self.exchange.gather(vectors[:real], sizes))
