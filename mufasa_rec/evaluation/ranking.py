"""Streaming, distributed metrics of a ranker: AUC, GAUC, LogLoss, NE and calibration, over all and over slices.

    LogLoss      mean of log(1 + exp(z)) - y z
    NE           LogLoss over that of always saying the mean click rate; only of unsampled data, calibrated
    calibration  sum of predicted clicks over clicks
    GAUC         mean of the users' AUC, weighted by their impressions; who clicked all or nothing is left out

Everything is exact while the impressions of all ranks fit `budget_rows`. Beyond that AUC is counted in fine bins of the
logit, with the most that it can be wrong by, and GAUC stays exact by reading files of users; the rest are sums anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mufasa_rec.evaluation.auc import area, area_of_counts, areas_of_groups, error_bound
from mufasa_rec.evaluation.ranking_figures import Figures, figures_of, probabilities
from mufasa_rec.evaluation.scored import ROW, Alone, Gathering, RowStore, Scored, gathered

_LARGEST_LOGIT = 16.0  # of the bins: a probability of 1e-7
Values = Tensor | np.ndarray


@dataclass(frozen=True, kw_only=True)
class RankingMetricsConfig:
    """How exact.

    Attributes:
        budget_rows: Impressions of all ranks together up to which everything is exact and stays in memory, 25 bytes
            each on every rank when the metrics are computed.
        num_bins: Bins of the logit beyond that; each takes 16 bytes, for all impressions and for every slice.
        folder: Where files of users are made beyond that; the system's folder for temporary files when None.
    """

    budget_rows: int = 10_000_000
    num_bins: int = 1 << 20
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.budget_rows < 0:
            raise ValueError(f"budget_rows={self.budget_rows}: choose 0 or more.")
        if self.num_bins < 2:
            raise ValueError(f"num_bins={self.num_bins}: choose 2 or more.")


@dataclass(frozen=True)
class RankingResult:
    """What `RankingMetrics.compute` gives, the same on every rank.

    Attributes:
        overall: Of all impressions.
        slices: Of each slice.
        scored: The impressions themselves, by row; None beyond the budget.
    """

    overall: Figures
    slices: dict[str, Figures]
    scored: Scored | None


class RankingMetrics:
    """Collects the scores of one task.

    Args:
        exchange: Reaches the other ranks; None for a world of one.
        slices: Names of slices, at most 31.
        config: How exact.

    Raises:
        ValueError: For too many slices.

    Example:
        >>> metrics = RankingMetrics()
        >>> logit, label = np.array([-1.0, 0.0, 2.0, 1.0]), np.array([0, 1, 1, 0])
        >>> metrics.add(logit=logit, label=label, user=np.array([1, 1, 2, 2]), row=np.arange(4))
        >>> found = metrics.compute().overall
        >>> found.auc, found.gauc, found.impressions
        (0.75, 1.0, 4)
    """

    def __init__(
        self,
        exchange: Gathering | None = None,
        slices: Sequence[str] = (),
        config: RankingMetricsConfig | None = None,
    ) -> None:
        if len(slices) > 31:
            raise ValueError(f"slices: {len(slices)}; metrics are kept for 31 at most.")
        self.exchange: Gathering = (exchange or Alone()).host()
        self.slices, self.config = tuple(slices), config or RankingMetricsConfig()
        self.store = RowStore(self.config.budget_rows // self.exchange.world_size, self.config.folder)
        groups = 1 + len(self.slices)
        self._sums = np.zeros((groups, 4))  # impressions, clicks, cross-entropy, predicted clicks
        self._bins: np.ndarray | None = None  # [groups, class, bin], once there are more rows than the budget

    def add(
        self, *, logit: Values, label: Values, user: Values, row: Values, slices: Mapping[str, Values] | None = None
    ) -> None:
        """Take impressions; on any rank, in any order, each once.

        Args:
            logit: Logits of unsampled data (see `corrected_logits`), `[n]`.
            label: 0 or 1, `[n]`; who has no label must be left out.
            user: `[n]` int64.
            row: Id of the impression, the same for every model that is compared, `[n]` int64.
            slices: Which impressions belong to each slice, `[n]` bool.

        Raises:
            ValueError: For labels other than 0 and 1, logits that are NaN, slices that were not announced or are
                missing, or lengths that differ.
        """
        columns = {"logit": _array(logit), "label": _array(label), "user": _array(user), "row": _array(row)}
        masks = {name: _array(mask) for name, mask in (slices or {}).items()}
        self._check(columns, masks)
        rows = np.zeros(len(columns["logit"]), ROW)
        for name, values in columns.items():
            rows[name] = values
        for bit, name in enumerate(self.slices):
            rows["slices"] |= masks[name].astype(np.uint32) << np.uint32(bit)
        self._count(rows)
        self.store.add(rows)

    def compute(self) -> RankingResult:
        """Compute the metrics of everything that all ranks have taken; collective."""
        sums = self.exchange.sum(torch.from_numpy(self._sums.copy())).numpy()
        if int(sums[0, 0]) <= self.config.budget_rows and not self._overflow():
            rows = gathered(self.store.all(), self.exchange)
            rows = rows[np.argsort(rows["row"], kind="stable")]
            scored = Scored(*(np.ascontiguousarray(rows[name]) for name in ("row", "user", "logit", "label")))
            areas = [(area(part["logit"], part["label"]), 0.0) for part in self._groups(rows)]
            by_user = [_user_sums(part) for part in self._groups(rows)]
        else:
            scored, areas, by_user = None, self._binned(), self._by_user()
        figures = [figures_of(*told) for told in zip(sums, areas, by_user, strict=True)]
        return RankingResult(figures[0], dict(zip(self.slices, figures[1:], strict=True)), scored)

    def _check(self, columns: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> None:
        for name, values in [*columns.items(), *masks.items()]:
            if values.shape != columns["logit"].shape or values.ndim != 1:
                raise ValueError(f"{name}: shape {values.shape} beside {columns['logit'].shape} logits; give one each.")
        if np.isnan(columns["logit"]).any():
            raise ValueError("logit: NaN; the weights or a content vector are not finite, so nothing can be ranked.")
        wrong = columns["label"][(columns["label"] != 0) & (columns["label"] != 1)]
        if len(wrong):
            raise ValueError(f"label: {wrong[0]}; metrics want 0 or 1, leave impressions without a label out.")
        if set(masks) != set(self.slices):
            raise ValueError(f"slices: {sorted(masks)}, but the metrics were made for {sorted(self.slices)}.")

    def _groups(self, rows: np.ndarray) -> list[np.ndarray]:
        """All rows, and those of each slice."""
        return [rows, *(rows[rows["slices"] >> np.uint32(bit) & 1 == 1] for bit in range(len(self.slices)))]

    def _count(self, rows: np.ndarray) -> None:
        for sums, part in zip(self._sums, self._groups(rows), strict=True):
            z, y = part["logit"].astype(np.float64), part["label"]
            sums += len(part), y.sum(), (np.logaddexp(0.0, z) - y * z).sum(), probabilities(z).sum()
        if self._bins is not None:
            self._count_bins(rows)
        elif self.store.num_rows + len(rows) > self.store.budget_rows:
            self._bins = np.zeros((1 + len(self.slices), 2, self.config.num_bins), np.int64)
            self._count_bins(np.concatenate([self.store.all(), rows]))

    def _count_bins(self, rows: np.ndarray) -> None:
        assert self._bins is not None
        for bins, part in zip(self._bins, self._groups(rows), strict=True):
            place = (part["logit"].astype(np.float64) / _LARGEST_LOGIT + 1.0) * (0.5 * self.config.num_bins)
            place = np.clip(np.floor(place), 0, self.config.num_bins - 1).astype(np.int64)
            # In place: a `bincount` would write all bins for each batch.
            np.add.at(bins.reshape(-1), part["label"].astype(np.int64) * self.config.num_bins + place, 1)

    def _overflow(self) -> bool:
        """Whether a rank has more rows than its share of the budget; all ranks agree."""
        return any(over for (over,) in self.exchange.counts([int(self._bins is not None)]))

    def _binned(self) -> list[tuple[float, float]]:
        """AUC of every group and the most that it can be wrong by, from counts of all ranks."""
        if self._bins is None:
            self._bins = np.zeros((1 + len(self.slices), 2, self.config.num_bins), np.int64)
            self._count_bins(self.store.all())
        found = []
        for bins in self._bins:
            negative, positive = self.exchange.sum(torch.from_numpy(bins.copy())).numpy().astype(np.float64)
            found.append((area_of_counts(positive, negative), error_bound(positive, negative)))
        return found

    def _by_user(self) -> list[np.ndarray]:
        """Sums of GAUC of every group, from files of users."""
        total = [np.zeros(3) for _ in range(1 + len(self.slices))]
        for mine in self.store.parts():
            rows = gathered(mine, self.exchange)
            for sums, part in zip(total, self._groups(rows), strict=True):
                sums += _user_sums(part)
        return total


def _user_sums(rows: np.ndarray) -> np.ndarray:
    """Areas times impressions, impressions and number of the users with both classes."""
    _, areas, sizes = areas_of_groups(rows["user"], rows["logit"], rows["label"])
    return np.array([(areas * sizes).sum(), sizes.sum(), len(sizes)])


def _array(values: Values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
