"""Ranks of targets in a catalog that is spread over ranks, and the metrics made of them.

    rank = 1 + number better + 1/2 number equal

Both numbers are sums over parts of the catalog, so each rank scores every user against its own part only and nobody
holds the whole catalog's scores. Items that the user has already seen are masked (by option), the target never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class RankSum(Protocol):
    """What ranking needs from the other ranks."""

    world_size: int
    rank: int

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks."""
        ...

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Return all ranks' rows end to end."""
        ...


@dataclass(frozen=True)
class Ranked:
    """Where each user's target came out; one row per user.

    Attributes:
        user: `[Q]` int64.
        target_row: Item row of the target, `[Q]`.
        rank: Mid-rank of the target, `[Q]` float64.
        top: Item rows of the best items, best first, `[Q, k]`.
        history_length: Events before the target, `[Q]`.
    """

    user: np.ndarray
    target_row: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    history_length: np.ndarray

    @staticmethod
    def concatenate(parts: list[Ranked]) -> Ranked:
        """Join parts, sorted by user, so that the result does not depend on who evaluated whom."""
        joined = [np.concatenate([getattr(part, name) for part in parts]) for name in Ranked.__dataclass_fields__]
        order = np.argsort(joined[0], kind="stable")
        return Ranked(*(values[order] for values in joined))


def catalog_part(num_items: int, rank: int, world_size: int) -> range:
    """Item rows that a rank scores."""
    return range(num_items * rank // world_size, num_items * (rank + 1) // world_size)


def rank_targets(
    scores: Tensor, part: range, target_row: Tensor, seen: tuple[Tensor, Tensor] | None, exchange: RankSum, k: int = 10
) -> tuple[Tensor, Tensor]:
    """Rank targets by the scores of this rank's part of the catalog; all ranks call it with the same queries.

    Args:
        scores: Scores of the part's items, `[Q, n]`; changed in place.
        part: Item rows of the part.
        target_row: Item row of each query's target, `[Q]`.
        seen: Query and item row of everything to mask, each `[s]`; None masks nothing.
        exchange: Reaches the other ranks.
        k: Length of the top lists.

    Returns:
        Mid-ranks `[Q]` float64 and item rows of the best `[Q, k]`, the same on every rank.

    Raises:
        ValueError: When a score of any rank is NaN; on all ranks alike.
    """
    queries = torch.arange(len(scores), device=scores.device)
    owned = (target_row >= part.start) & (target_row < part.stop)
    column = (target_row - part.start).clamp(0, max(len(part) - 1, 0))
    target_score = torch.zeros(len(scores), dtype=scores.dtype, device=scores.device)
    if len(part):
        target_score = torch.where(owned, scores[queries, column], target_score)
    # One sum for both: a NaN of one rank is an error on all of them, and nobody waits for a rank that has stopped.
    told = exchange.sum(torch.cat([target_score, torch.isnan(scores).any().to(scores.dtype)[None]]))
    if not told[-1] == 0:
        raise ValueError("scores: NaN; the weights or a content vector are not finite, so no rank can be told.")
    target_score = told[:-1, None]
    if seen is not None:
        query, row = seen
        here = (row >= part.start) & (row < part.stop) & (row != target_row[query])
        scores[query[here], row[here] - part.start] = float("-inf")
    better = (scores > target_score).sum(1)
    equal = (scores == target_score).sum(1) - owned.long()
    counts = exchange.sum(torch.stack([better, equal]).double())
    rank = 1.0 + counts[0] + 0.5 * counts[1]
    return rank, _best(scores, part, exchange, k)


def _best(scores: Tensor, part: range, exchange: RankSum, k: int) -> Tensor:
    """Item rows of the `k` best items over all ranks, `[Q, k]`; -1 where there are fewer."""
    width = min(k, len(part))
    value, column = torch.topk(scores, width, dim=1)
    row = column + part.start
    if width < k:
        value = torch.nn.functional.pad(value, (0, k - width), value=float("-inf"))
        row = torch.nn.functional.pad(row, (0, k - width), value=-1)
    sizes = [len(scores)] * exchange.world_size
    values = exchange.gather(value, sizes).view(exchange.world_size, len(scores), k)
    rows = exchange.gather(row, sizes).view(exchange.world_size, len(scores), k)
    values, rows = (x.permute(1, 0, 2).reshape(len(scores), -1) for x in (values, rows))
    best, place = torch.topk(values, k, dim=1)
    return torch.where(best == float("-inf"), -1, rows.gather(1, place))


def gains(rank: np.ndarray, k: int = 10) -> dict[str, np.ndarray]:
    """Per-user HR@k, NDCG@k and reciprocal rank `[Q]`, of mid-ranks `[Q]`.

    Example:
        >>> {name: v.round(3).tolist() for name, v in gains(np.array([1.0, 3.0, 11.0])).items()}
        {'hr@10': [1.0, 1.0, 0.0], 'ndcg@10': [1.0, 0.5, 0.0], 'mrr': [1.0, 0.333, 0.091]}
    """
    hit = rank <= k
    return {f"hr@{k}": hit.astype(float), f"ndcg@{k}": np.where(hit, 1.0 / np.log2(1.0 + rank), 0.0), "mrr": 1.0 / rank}


def bootstrap_interval(
    values: np.ndarray, *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values [Q]` over users.

    Example:
        >>> low, high = bootstrap_interval(np.array([0.0, 1.0] * 200))
        >>> 0.44 < low < 0.5 < high < 0.56
        True
    """
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(samples)])
    tail = (1.0 - level) / 2.0
    return float(np.quantile(means, tail)), float(np.quantile(means, 1.0 - tail))
