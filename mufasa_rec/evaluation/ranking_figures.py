"""The figures of a ranker's impressions: sums to metrics, slices, and probabilities of unsampled data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

FEW_IMPRESSIONS = 5
_HISTORY_BORDERS = (10, 50)
Logits = TypeVar("Logits", Tensor, np.ndarray)


@dataclass(frozen=True)
class Figures:
    """Metrics of some impressions; NaN where they cannot be told.

    Attributes:
        impressions: How many.
        clicks: How many of them have label 1.
        auc: Area under the ROC curve.
        auc_error: Most that `auc` can be wrong by; 0 when it is exact.
        gauc: Mean AUC of the users that have both classes, weighted by their impressions.
        gauc_users: Those users.
        logloss: Mean cross-entropy.
        ne: Normalised entropy.
        calibration: Predicted clicks over clicks.
    """

    impressions: int
    clicks: int
    auc: float
    auc_error: float
    gauc: float
    gauc_users: int
    logloss: float
    ne: float
    calibration: float


def figures_of(sums: np.ndarray, auc: tuple[float, float], by_user: np.ndarray) -> Figures:
    """Metrics from sums.

    Args:
        sums: Impressions, clicks, sum of cross-entropies, sum of predicted clicks.
        auc: AUC, and the most that it can be wrong by.
        by_user: Sum of the users' areas times their impressions, their impressions, and their number.
    """
    n, clicks, entropy, predicted = (float(x) for x in sums)
    rate = clicks / n if n else float("nan")
    baseline = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else float("nan")
    logloss = entropy / n if n else float("nan")
    return Figures(
        impressions=int(n),
        clicks=int(clicks),
        auc=auc[0],
        auc_error=auc[1],
        gauc=float(by_user[0] / by_user[1]) if by_user[1] else float("nan"),
        gauc_users=int(by_user[2]),
        logloss=logloss,
        ne=logloss / baseline,
        calibration=predicted / clicks if clicks else float("nan"),
    )


def corrected_logits(logit: Logits, negative_rate: float) -> Logits:
    """Logits of unsampled data from those of a model that was trained on a share of the negatives, uncorrected.

    The same as `q / (q + (1 - q) / w)` of the probability q with the share w that was kept.

    Args:
        logit: Logits, tensor or array of any shape.
        negative_rate: Share of the negatives that was kept.

    Raises:
        ValueError: For a share that is not above 0 and at most 1.

    Example:
        >>> q, w = 0.3, 0.1
        >>> z = corrected_logits(np.log(np.array([q / (1 - q)])), w)
        >>> bool(np.isclose(probabilities(z), q / (q + (1 - q) / w)).all())
        True
    """
    if not 0.0 < negative_rate <= 1.0:
        raise ValueError(f"negative_rate={negative_rate}: choose above 0 and at most 1, the share that was kept.")
    shift: Any = math.log(negative_rate)
    return logit + shift


def probabilities(logit: np.ndarray) -> np.ndarray:
    """Probabilities of logits, without overflow."""
    return np.exp(-np.logaddexp(0.0, -logit.astype(np.float64)))


def impression_slices(
    item_count: np.ndarray, history_length: np.ndarray, has: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Which impressions belong to which slice, `[n]` bool by name.

    Args:
        item_count: Training impressions of the candidate's item, `[n]`.
        history_length: Events before the request, `[n]`.
        has: Whether the candidate's item has each modality, `[n]` bool.
    """
    low, high = _HISTORY_BORDERS
    found = {
        "new item": item_count == 0,
        f"item with ≤ {FEW_IMPRESSIONS} training impressions": item_count <= FEW_IMPRESSIONS,
        "no history": history_length == 0,
        f"history under {low}": (history_length > 0) & (history_length < low),
        f"history {low} to {high - 1}": (history_length >= low) & (history_length < high),
        f"history of {high} and more": history_length >= high,
    }
    for name, mask in sorted(has.items()):
        found[f"item has {name}"] = mask.astype(bool)
        found[f"item without {name}"] = ~mask.astype(bool)
    return found
