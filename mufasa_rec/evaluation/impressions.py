"""Evaluation of a ranker on all impressions of one part: metrics of every task, over all and over slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mufasa_rec.data.item_columns import ItemColumn
from mufasa_rec.data.ranking_batch import RankingBatch
from mufasa_rec.data.row_loader import RowLoader
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.evaluation.ranking import RankingMetrics, RankingMetricsConfig, RankingResult
from mufasa_rec.evaluation.ranking_figures import impression_slices

NEW_ITEM = "new item"
FIGURES = ("auc", "gauc", "logloss", "ne", "calibration")
Score = Callable[[RankingBatch], Tensor]


def model_score(model: nn.Module) -> Score:
    """Logits `[C, T]` of a sharded ranker in evaluation mode."""

    def score(batch: RankingBatch) -> Tensor:
        return model(batch)[1].logits

    return score


class ImpressionsEvaluator:
    """Scores every impression of one part of a split.

    Args:
        loader: Evaluation batches of this rank.
        tasks: Names of the tasks, in the order of the labels.
        has: Whether each item row has a modality, bool by row, for slices.
        exchange: Reaches the other ranks.
        device: Where scores are computed.
        config: How exact the metrics are.
    """

    def __init__(
        self,
        loader: RowLoader[RankingBatch],
        tasks: Sequence[str],
        has: Mapping[str, ItemColumn],
        exchange: RankExchange,
        device: torch.device,
        config: RankingMetricsConfig | None = None,
    ) -> None:
        self.loader, self.tasks, self.exchange, self.device, self.config = (
            loader,
            tuple(tasks),
            exchange,
            device,
            config,
        )
        self.has = has

    @torch.no_grad()
    def evaluate(
        self, score: Score, after_batch: Callable[[], None] | None = None, *, slices: bool = True
    ) -> dict[str, RankingResult]:
        """Score all impressions; collective, the same result on every rank.

        Args:
            score: Gives logits of a batch that lies on the device.
            after_batch: Called after every batch, equally often on every rank; may end the evaluation by raising.
            slices: Whether figures of slices are wanted.

        Returns:
            The metrics of each task.
        """
        names = tuple(self._slices(None)) if slices else ()
        metrics = {task: RankingMetrics(self.exchange, names, self.config) for task in self.tasks}
        for batch in self.loader.batches(0):
            logits = score(batch.to(self.device)).float().cpu()
            masks = self._slices(batch) if slices else {}
            user = torch.repeat_interleave(batch.user, torch.diff(batch.candidate_offsets))
            for column, task in enumerate(self.tasks):
                metrics[task].add(
                    logit=logits[:, column],
                    label=batch.labels[:, column],
                    user=user,
                    row=batch.impression,
                    slices=masks,
                )
            if after_batch is not None:
                after_batch()
        return {task: found.compute() for task, found in metrics.items()}

    def metrics(self, score: Score, after_batch: Callable[[], None] | None = None) -> dict[str, float]:
        """Figures of the first task, and those of others as `<task>.<figure>`; see `evaluate`."""
        found: dict[str, float] = {}
        for number, (task, result) in enumerate(self.evaluate(score, after_batch, slices=False).items()):
            prefix = f"{task}." if number else ""
            found.update({prefix + name: getattr(result.overall, name) for name in FIGURES})
        return found

    def _slices(self, batch: RankingBatch | None) -> dict[str, np.ndarray]:
        """Which impressions of a batch are in each slice; without a batch the names alone."""
        if batch is None:
            none = np.zeros(0, np.int64)
            return impression_slices(none, none, dict.fromkeys(self.has, none))
        history = torch.repeat_interleave(batch.history_length, torch.diff(batch.candidate_offsets))
        rows = batch.item_row[batch.candidate_item].numpy()
        has = {name: column[rows] for name, column in self.has.items()}
        return impression_slices(batch.item_count.numpy(), history.numpy(), has)
