"""The loader of requests: the order and state of every loader, batches of requests or of single impressions."""

from __future__ import annotations

import numpy as np
import torch
from safetensors import safe_open

from mufasa_rec.data import paths
from mufasa_rec.data.item_lookup import ItemLookup, ItemVocabulary
from mufasa_rec.data.loader import DataConfig
from mufasa_rec.data.order import EpochOrder
from mufasa_rec.data.parquet import RowGroupReader, RowGroupRef
from mufasa_rec.data.randomness import uniform
from mufasa_rec.data.ranking_batch import RankingBatch
from mufasa_rec.data.ranking_collate import (
    Shown,
    ShownFeatures,
    collate_requests,
    keep_shown,
    labels_of,
    one_by_one,
    take_shown,
)
from mufasa_rec.data.requests import IMPRESSION
from mufasa_rec.data.row_loader import RowLoader
from mufasa_rec.data.schema import SplitManifest

_NEGATIVES_STREAM = 5


class RankingLoader(RowLoader[RankingBatch]):
    """Batches of the requests of one part of a split for one rank; `data.batch_size` counts requests.

    Args:
        groups: Row groups of the part.
        catalog: Items of the data set.
        features: What candidates come with.
        config: What is read.
        columns: List columns of the events to read beside `item`.
        training: Whether the order is drawn in each epoch, and negatives are dropped.
        align: Histories begin at a multiple of this many events of their stream.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the run.

    Raises:
        ValueError: When `data.requests.correction` does not fit the number of tasks.
    """

    def __init__(  # noqa: PLR0913  what it reads, from where it stands, and how it draws
        self,
        groups: list[RowGroupRef],
        catalog: ItemLookup,
        features: ShownFeatures,
        config: DataConfig,
        *,
        columns: tuple[str, ...] = (),
        training: bool = False,
        align: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        files = RowGroupReader(("item", *columns), shown=features.columns)
        super().__init__(groups, config, files, shuffle=training, rank=rank, world_size=world_size, seed=seed)
        self.catalog, self.features, self.config, self.align = catalog, features, config, align
        tasks, requests = features.info.tasks, config.requests
        if training and requests.correction == "offset" and len(tasks) > 1 and self.negative_rate < 1:
            raise ValueError(
                f"data.requests.correction='offset': one offset cannot correct {len(tasks)} tasks "
                f"({', '.join(tasks)}); choose 'weight'."
            )

    @property
    def negative_rate(self) -> float:
        """Share of all negatives that training sees: what the source kept times what the configuration keeps."""
        return self.features.info.negative_rate * self.config.requests.negative_rate

    def make(self, order: EpochOrder, step: int) -> RankingBatch:
        """Make this rank's share of one step."""
        pieces, real = self._pieces(order, step)
        shown = take_shown(pieces)
        positive: np.ndarray = labels_of(shown, self.features.info.tasks).max(axis=1) > 0
        if self.shuffle and self.config.requests.negative_rate < 1:
            keep = positive | self._kept(order.epoch, shown)
            shown, positive = keep_shown(shown, keep), positive[keep]
        if not self.config.requests.per_request and len(positive):
            pieces, shown = one_by_one(pieces, shown)
        config = self.config
        batch = collate_requests(
            pieces,
            shown,
            self.catalog,
            self.features,
            max_history=config.max_history,
            align=self.align,
            dedup=config.dedup,
        )
        if self.shuffle and self.negative_rate < 1:
            self._correct(batch, torch.from_numpy(positive))
        batch.epoch, batch.step = order.epoch, step
        batch.num_rows = batch.num_rows if real else 0
        return batch

    def _kept(self, epoch: int, shown: Shown) -> np.ndarray:
        """Which candidates stay if they are negatives: a draw by (seed, epoch, impression), `[C]` bool."""
        draw = uniform(self.seed, epoch, _NEGATIVES_STREAM, shown.columns[IMPRESSION])
        return draw < self.config.requests.negative_rate

    def _correct(self, batch: RankingBatch, positive: torch.Tensor) -> None:
        """Make up for the negatives that training does not see."""
        if self.config.requests.correction == "weight":
            batch.weight = torch.where(positive, batch.weight, batch.weight / self.negative_rate)
        else:
            batch.logit_offset = torch.full_like(batch.logit_offset, -float(np.log(self.negative_rate)))


def load_users(dataset: paths.Location, split: SplitManifest, min_count: int) -> ItemVocabulary:
    """Embedding keys of users with enough training impressions; key 0 is shared by all others.

    Raises:
        ValueError: When they were counted on another split.
    """
    file = paths.join(dataset, "splits", split.id, "users.safetensors")
    with safe_open(paths.local_copy(file), framework="numpy") as handle:
        metadata = handle.metadata() or {}
        ids, counts = handle.get_tensor("id"), handle.get_tensor("count")
    if metadata.get("split_hash") != split.hash:
        raise ValueError(f"{file}: counted on another split than {split.id}@{split.hash}; prepare the data set again.")
    return ItemVocabulary(ids[counts >= min_count], f"{split.id}@{split.hash}", min_count)
