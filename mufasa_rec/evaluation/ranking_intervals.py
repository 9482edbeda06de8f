"""Intervals of a ranker's metrics, and of the difference of two models: bootstrap over users, seeds averaged.

Users are drawn with replacement, each with all of its impressions; the seeds of a model are averaged inside each draw.
So an interval says what other users would have done, given these seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mufasa_rec.evaluation.auc import area_of_sorted, areas_of_groups
from mufasa_rec.evaluation.scored import Scored

Metric = Literal["auc", "gauc", "logloss"]
_SAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def interval(models: Sequence[Scored], metric: Metric, *, samples: int = _SAMPLES, seed: int = 0) -> Interval:
    """Mean of a metric over seeds.

    Args:
        models: Scores of one model, by seed, all of the same impressions.
        metric: Which metric.
        samples: Draws of users.
        seed: Seed of the draws.

    Raises:
        ValueError: When the impressions differ.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> n = 400
        >>> one = Scored(np.arange(n), np.arange(n) // 4, rng.normal(size=n).astype("f4"), rng.integers(0, 2, n))
        >>> found = interval([one], "auc", samples=200)
        >>> found.low < 0.5 < found.high, found.low < found.value < found.high
        (True, True)
    """
    return _interval(models, [], metric, samples, seed)


def paired_interval(
    better: Sequence[Scored], worse: Sequence[Scored], metric: Metric, *, samples: int = _SAMPLES, seed: int = 0
) -> Interval:
    """Difference of a metric between two models, the same users drawn for both.

    Args:
        better: Scores of one model, by seed.
        worse: Scores of the other, by seed, all of the same impressions.
        metric: Which metric; of a loss the better model's difference is below 0.
        samples: Draws of users.
        seed: Seed of the draws.

    Raises:
        ValueError: When the impressions differ.
    """
    return _interval(better, worse, metric, samples, seed)


def _interval(plus: Sequence[Scored], minus: Sequence[Scored], metric: Metric, samples: int, seed: int) -> Interval:
    if not plus:
        raise ValueError("models: none; give the scores of one seed or more.")
    first = plus[0]
    for other in [*plus, *minus]:
        if not (np.array_equal(other.row, first.row) and np.array_equal(other.label, first.label)):
            raise ValueError("scores: of other impressions; evaluate all models on the same part of one split.")
    users, owner = np.unique(first.user, return_inverse=True)
    readers = [[_Reader(scored, owner, len(users), metric) for scored in side] for side in (plus, minus)]

    def value(weight: np.ndarray) -> float:
        means = [np.mean([reader.read(weight) for reader in side]) if side else 0.0 for side in readers]
        return float(means[0] - means[1])

    rng = np.random.default_rng(seed)
    drawn = [value(np.bincount(rng.integers(0, len(users), len(users)), minlength=len(users))) for _ in range(samples)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(value(np.ones(len(users))), float(low), float(high))


class _Reader:
    """A metric of one model as a function of how often each user counts; what does not depend on that is done once."""

    def __init__(self, scored: Scored, owner: np.ndarray, num_users: int, metric: Metric) -> None:
        self.metric = metric
        if metric == "auc":
            order = np.argsort(scored.logit, kind="stable")
            self.score, self.label, self.owner = scored.logit[order], scored.label[order], owner[order]
            return
        self.total, self.size = np.zeros(num_users), np.zeros(num_users)
        if metric == "gauc":
            user, areas, sizes = areas_of_groups(owner, scored.logit, scored.label)
            self.total[user], self.size[user] = areas * sizes, sizes
        else:
            z = scored.logit.astype(np.float64)
            losses = np.logaddexp(0.0, z) - scored.label * z
            self.total = np.bincount(owner, losses, minlength=num_users)
            self.size = np.bincount(owner, minlength=num_users).astype(np.float64)

    def read(self, weight: np.ndarray) -> float:
        """The metric with users that count `weight [users]` times; NaN where it cannot be told."""
        if self.metric == "auc":
            return area_of_sorted(self.score, self.label, weight[self.owner])
        size = (weight * self.size).sum()
        return float((weight * self.total).sum() / size) if size else float("nan")
