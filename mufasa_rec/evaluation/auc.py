"""Areas under the ROC curve: of all impressions, of each user's, of counted ones, and their weighted forms.

The area is the share of (click, other) pairs that are in the right order, a tie being half right. TorchRec's AUC keeps
a window of the newest examples, and its GAUC wants a user's impressions inside one batch and does not halve ties;
torchmetrics' exact AUROC knows neither groups nor resampling, and its bins are of the probability, too wide where most
are small. So the few lines stand here, checked against scikit-learn.
"""

from __future__ import annotations

import numpy as np


def area(score: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Area under the ROC curve.

    Args:
        score: Scores, `[n]`.
        label: 0 or 1, `[n]`.
        weight: How often each impression counts, `[n]`; once when None.

    Returns:
        The area; NaN when one of the classes is missing.

    Example:
        >>> area(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
        0.875
    """
    order = np.argsort(score, kind="stable")
    return area_of_sorted(score[order], label[order], None if weight is None else weight[order])


def area_of_sorted(score: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> float:
    """As `area`, of scores that ascend; for many weights of the same scores."""
    weight = np.ones(len(score)) if weight is None else weight.astype(np.float64)
    starts = _starts(score)
    positive, negative = weight * (label == 1), weight * (label == 0)
    if not len(score):
        return float("nan")
    return area_of_counts(np.add.reduceat(positive, starts), np.add.reduceat(negative, starts))


def area_of_counts(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area of impressions that were counted in bins of ascending score; those of a bin are ties.

    Args:
        positive: Clicks of each bin, `[k]`.
        negative: Other impressions of each bin, `[k]`.

    Returns:
        The area; NaN when one of the classes is missing.
    """
    total = float(positive.sum()) * float(negative.sum())
    if total == 0.0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + 0.5 * negative)).sum()) / total


def error_bound(positive: np.ndarray, negative: np.ndarray) -> float:
    """Most that `area_of_counts` may differ from the area of the uncounted scores: half of all pairs within a bin."""
    total = float(positive.sum()) * float(negative.sum())
    return float("nan") if total == 0.0 else 0.5 * float((positive * negative).sum()) / total


def areas_of_groups(group: np.ndarray, score: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, ...]:
    """Area of each group that has both classes.

    Args:
        group: Group (user) of each impression, `[n]`.
        score: Scores, `[n]`.
        label: 0 or 1, `[n]`.

    Returns:
        Groups `[g]` ascending, their areas `[g]`, and their impressions `[g]`.

    Example:
        >>> user, score, label = np.array([7, 7, 3, 7]), np.array([1, 2, 5, 3]), np.array([0, 1, 1, 0])
        >>> users, areas, sizes = areas_of_groups(user, score, label)
        >>> users.tolist(), areas.tolist(), sizes.tolist()
        ([7], [0.5], [3])
    """
    if not len(group):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    order = np.lexsort((score, group))
    group, score, label = group[order], score[order], label[order]
    ties = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]) | (score[1:] != score[:-1])])
    positive = np.add.reduceat((label == 1).astype(np.int64), ties)
    negative = np.diff(np.r_[ties, len(group)]) - positive
    groups = _starts(group[ties])
    before = np.cumsum(negative) - negative
    below = before - np.repeat(before[groups], np.diff(np.r_[groups, len(ties)]))
    right = np.add.reduceat(positive * (below + 0.5 * negative), groups)
    clicks, others = np.add.reduceat(positive, groups), np.add.reduceat(negative, groups)
    both = (clicks > 0) & (others > 0)
    areas = right[both] / (clicks[both].astype(np.float64) * others[both])
    return group[ties][groups][both], areas, (clicks + others)[both]


def _starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.zeros(0, np.int64)
