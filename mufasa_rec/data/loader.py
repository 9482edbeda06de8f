"""The loader: an endless, resumable stream of finished batches whose content does not depend on the number of ranks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mufasa_rec.data.batch import Batch
from mufasa_rec.data.collate import Windows, collate, cut_windows, ragged_arange
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.negatives import NegativeSampler, NegativesConfig
from mufasa_rec.data.order import EpochOrder
from mufasa_rec.data.parquet import RowGroupReader, RowGroupRef
from mufasa_rec.data.row_loader import LoaderState, RowLoader

logger = logging.getLogger(__name__)
__all__ = ["DataConfig", "Loader", "LoaderState", "RequestsConfig"]


@dataclass(frozen=True, kw_only=True)
class RequestsConfig:
    """How requests are read, for ranking.

    Attributes:
        negative_rate: Share of the negatives (impressions whose labels are all 0) that training keeps, drawn anew in
            each epoch; positives are all kept. Evaluation keeps everything.
        correction: What makes up for it: ``offset`` adds `-log(rate)` to the logits in training, so that the model's
            own logits are calibrated (one task); ``weight`` lets a kept negative count `1 / rate` times.
        per_request: Candidates of a request share its history, read and embedded once; False repeats the history for
            each candidate, with the same logits.
    """

    negative_rate: float = 1.0
    correction: Literal["offset", "weight"] = "offset"
    per_request: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.negative_rate <= 1.0:
            raise ValueError(f"data.requests.negative_rate={self.negative_rate}: choose above 0, at most 1.")
        if self.correction not in ("offset", "weight"):
            raise ValueError(f"data.requests.correction={self.correction!r}: choose 'offset' or 'weight'.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which batches.

    Attributes:
        dataset: Folder or URL of a prepared data set.
        split: Split to train and evaluate on.
        modalities: Content modalities to use; all when None.
        batch_size: Rows of a global batch, over all ranks.
        num_readers: Virtual readers that a global batch takes equal numbers of rows from; part of the data's order.
        max_history: Events of history that a row keeps; with sparse attention, and the rest of the block that the
            oldest of them lies in.
        target_actions: Actions that are targets, by name; all when None.
        min_count: Training events that an item needs for an embedding of its own; rarer items share one.
        negatives: How targets are contrasted.
        prefetch: Batches made ahead of the step, by one thread; 0 makes them when they are asked for.
        dedup: Look each distinct item of a batch up once.
        requests: How requests are read, for ranking.
    """

    dataset: str = ""
    split: str = "leave_one_out"
    modalities: tuple[str, ...] | None = None
    batch_size: int = 128
    num_readers: int = 64
    max_history: int = 200
    target_actions: tuple[str, ...] | None = None
    min_count: int = 5
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    prefetch: int = 2
    dedup: bool = True
    requests: RequestsConfig = field(default_factory=RequestsConfig)

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_readers", "max_history", "min_count", "prefetch"):
            least = 0 if name == "prefetch" else 1
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: choose {least} or more.")
        if self.batch_size % self.num_readers:
            raise ValueError(
                f"data.batch_size={self.batch_size}: must be a multiple of data.num_readers={self.num_readers}, "
                "because a global batch takes the same number of rows from each virtual reader."
            )


class Loader(RowLoader[Batch]):
    """Batches of one part of a split for one rank.

    Args:
        groups: Row groups of the part.
        catalog: Items of the data set.
        config: What is read.
        columns: List columns to read beside `item`.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the run.
        sampler: Draws candidates in training; None for evaluation, which has none.
        target_actions: Codes of the actions that are targets in training; all when None.
        align: Histories begin at a multiple of this many events of their stream.
    """

    def __init__(  # noqa: PLR0913  what it reads, from where it stands, and how it draws
        self,
        groups: list[RowGroupRef],
        catalog: ItemLookup,
        config: DataConfig,
        *,
        columns: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        sampler: NegativeSampler | None = None,
        target_actions: np.ndarray | None = None,
        align: int = 1,
    ) -> None:
        files = RowGroupReader(("item", *columns))
        shuffle = sampler is not None
        super().__init__(groups, config, files, shuffle=shuffle, rank=rank, world_size=world_size, seed=seed)
        self.target_actions, self.align = target_actions, align
        self.catalog, self.config, self.sampler = catalog, config, sampler
        self._told = False

    def make(self, order: EpochOrder, step: int) -> Batch:
        """Make this rank's share of one step."""
        pieces, real = self._pieces(order, step)
        windows = cut_windows(pieces, self.config.max_history, align=self.align)
        if real and self.sampler is None and not windows.lengths.all():
            row = int(windows.row_id[np.flatnonzero(windows.lengths == 0)[0]])
            raise ValueError(f"rows: row {row} of an evaluation part has no event to rank; leave such rows out.")
        seen = cut_windows(pieces, None) if self.sampler is None else None
        self._tell_cut_targets(windows)
        rows, bias = self._candidates(windows, order, step)
        actions = None if self.sampler is None else self.target_actions
        batch = collate(windows, self.catalog, rows, bias, seen=seen, target_actions=actions, dedup=self.config.dedup)
        batch.epoch, batch.step = order.epoch, step
        batch.num_rows = batch.num_rows if real else 0
        return batch

    def _tell_cut_targets(self, windows: Windows) -> None:
        """Say once that rows have targets further back than the history that they keep."""
        if not windows.num_cut or self.sampler is None or self._told or self.rank:
            return
        self._told = True
        logger.warning(
            "data.max_history=%d: rows have targets further back than that (%d in this batch), never trained on; "
            "raise data.max_history, or prepare the data with no more targets per row (split.targets_per_row)",
            self.config.max_history,
            windows.num_cut,
        )

    def _candidates(self, windows: Windows, order: EpochOrder, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Item rows and `-log Q` of the candidates that this rank brings to the step."""
        if self.sampler is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        rows = self.sampler.shared(order.epoch, step, self.rank, self.world_size)
        num_rows = order.num_rows(step)
        position = ragged_arange(windows.lengths)
        is_target = position >= np.repeat(np.maximum(windows.target_from, 1), windows.lengths)
        if self.sampler.full:
            self.sampler.check_targets(self.catalog.rows_of(windows.columns["item"][is_target]))
        else:
            row_id = np.repeat(windows.row_id, windows.lengths)
            stream = position + np.repeat(windows.start_position, windows.lengths)
            taken = is_target & self.sampler.in_batch(order.epoch, row_id, stream, num_rows)
            rows = np.concatenate([rows, self.catalog.rows_of(windows.columns["item"][taken])])
        return rows, self.sampler.bias(rows, num_rows)
