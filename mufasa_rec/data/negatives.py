"""Which items a step's targets compete with, drawn where the batch is made so that every lookup is known there.

Full softmax: every item that could be chosen in training, each rank bringing its part. Sampled softmax: uniform draws
plus a thinned sample of the batch's own targets, shared by the whole global batch; each carries `-log Q`, where Q is
the expected *number* of times that item is among the step's negatives over all sources and ranks:

    Q(i) = n_inbatch * p_target(i) + n_uniform / V

(with probabilities per source instead the estimate of the partition sum is biased).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mufasa_rec.data.item_columns import ChosenItems
from mufasa_rec.data.randomness import generator, uniform

_FULL_LIMIT = 20_000  # items up to which `auto` means full softmax
_UNIFORM_STREAM, _INBATCH_STREAM = 2, 3


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """How targets are contrasted.

    Attributes:
        softmax: ``full``, ``sampled``, or ``auto``: full up to 20,000 items.
        num_uniform: Uniform negatives of a step, shared by the global batch.
        num_inbatch: Expected number of the global batch's own targets that serve as negatives.
    """

    softmax: Literal["auto", "full", "sampled"] = "auto"
    num_uniform: int = 2048
    num_inbatch: int = 2048

    def __post_init__(self) -> None:
        for name in ("num_uniform", "num_inbatch"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.negatives.{name}={getattr(self, name)}: choose 0 or more.")

    def is_full(self, num_items: int) -> bool:
        """Whether a catalog of `num_items` is scored in full."""
        return self.softmax == "full" or (self.softmax == "auto" and num_items <= _FULL_LIMIT)


class NegativeSampler:
    """Draws the candidates of a step; a pure function of (seed, epoch, step, row).

    Args:
        config: How targets are contrasted.
        available: Which items may be negatives, `[items]` bool.
        counts: Training events per item, `[items]`: the popularity that in-batch targets follow.
        targets_per_row: Mean number of targets of a training row.
        seed: Seed of the run.
    """

    def __init__(
        self, config: NegativesConfig, available: np.ndarray, counts: np.ndarray, targets_per_row: float, seed: int
    ) -> None:
        self.config, self.seed = config, seed
        self.items = ChosenItems(available)
        if not len(self.items):
            raise ValueError("items: none is available in the training period, so there is nothing to train on.")
        self.full = config.is_full(len(self.items))
        if not self.full and config.num_uniform + config.num_inbatch == 0:
            raise ValueError(
                f"data.negatives.num_uniform and num_inbatch are both 0, but the softmax over {len(self.items)} items "
                "is sampled; give one of them, or set data.negatives.softmax='full'."
            )
        self.available = available
        self._all = np.flatnonzero(available) if self.full else available[:0]  # what every step scores
        self.counts, self.total = counts, max(int(counts.sum()), 1)
        self.targets_per_row = targets_per_row

    def check_targets(self, rows: np.ndarray) -> None:
        """Refuse targets with item rows `[n]` that a full softmax does not score.

        Raises:
            ValueError: Names how many.
        """
        wrong = rows[~self.available[rows]] if self.full else rows[:0]
        if len(wrong):
            raise ValueError(
                f"item_counts: {len(np.unique(wrong))} items are training targets without a training event in "
                "the split's item_counts.safetensors; count the items of the training rows again, or prepare again."
            )

    def shared(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """Item rows of this rank's part of the candidates that every rank shares, `[c]`."""
        rows = self._all
        if not self.full:
            draw = generator(self.seed, epoch, step, _UNIFORM_STREAM).integers(
                0, len(self.items), self.config.num_uniform
            )
            rows = self.items.rows(draw)
        return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]

    def in_batch(self, epoch: int, row_id: np.ndarray, position: np.ndarray, num_rows: int) -> np.ndarray:
        """Which targets of a step of `num_rows` rows also serve as negatives, bool of the shape of `row_id`.

        Each target is taken independently with the same probability, so that an item's expected number is proportional
        to how often it is a target.
        """
        if self.full:
            return np.zeros(len(row_id), dtype=bool)
        return uniform(self.seed, epoch, _INBATCH_STREAM, row_id, position) < self.share(num_rows)

    def share(self, num_rows: int) -> float:
        """Probability that a target serves as a negative."""
        return min(1.0, self.config.num_inbatch / max(num_rows * self.targets_per_row, 1.0))

    def bias(self, rows: np.ndarray, num_rows: int) -> np.ndarray:
        """`-log Q` of candidates with item rows `[c]` in a step of `num_rows` rows, float32; 0 in a full softmax."""
        if self.full:
            return np.zeros(len(rows), dtype=np.float32)
        expected_targets = num_rows * self.targets_per_row
        popularity = self.counts[rows] / self.total
        expected = self.share(num_rows) * expected_targets * popularity
        expected = expected + self.config.num_uniform / len(self.items)
        return -np.log(np.maximum(expected, 1e-12)).astype(np.float32)
