"""Ranks of targets in a catalog that is spread over ranks, and the metrics made of them.

    rank = 1 + number better + 1/2 number equal

Both numbers are sums over parts of the catalog, so each rank scores every user against its own part only and nobody
holds the whole catalog's scores. Items that the user has already seen are masked (by option), the target never.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
        cold_rank: Mid-rank of the target among the items without a training event, `[Q]` float64; NaN for a target that
            has one, and where it was not asked for.
    """

    user: np.ndarray
    target_row: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    history_length: np.ndarray
    cold_rank: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if len(self.cold_rank) != len(self.rank):
            object.__setattr__(self, "cold_rank", np.full(len(self.rank), np.nan))

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
    target_score, owned = _own_scores(scores, part, target_row)
    # One sum for both: a NaN of one rank is an error on all of them, and nobody waits for a rank that has stopped.
    told = exchange.sum(torch.cat([target_score, torch.isnan(scores).any().to(scores.dtype)[None]]))
    if not told[-1] == 0:
        raise ValueError("scores: NaN; the weights or a content vector are not finite, so no rank can be told.")
    target_score = told[:-1, None]
    if seen is not None:
        query, row = seen
        here = (row >= part.start) & (row < part.stop) & (row != target_row[query])
        scores[query[here], row[here] - part.start] = float("-inf")
    return _mid_rank(scores, target_score, owned, exchange), _best(scores, part, exchange, k)


def rank_among(scores: Tensor, part: range, target_row: Tensor, among: Tensor, exchange: RankSum) -> Tensor:
    """Rank targets among some items only; all ranks call it with the same queries, behind `rank_targets`.

    Args:
        scores: Scores of the part's items as `rank_targets` left them, `[Q, n]`; not changed.
        part: Item rows of the part.
        target_row: Item row of each query's target, `[Q]`.
        among: Which items of the whole catalog count, `[items]` bool.
        exchange: Reaches the other ranks.

    Returns:
        Mid-ranks `[Q]` float64, NaN for a target that is not among them; the same on every rank.
    """
    target_score, owned = _own_scores(scores, part, target_row)
    target_score = exchange.sum(target_score)[:, None]
    inside = among[target_row]
    chosen = scores[:, among[part.start : part.stop]]
    rank = _mid_rank(chosen, target_score, owned & inside, exchange)
    return torch.where(inside, rank, float("nan"))


def _own_scores(scores: Tensor, part: range, target_row: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the targets `[Q]` that lie in this rank's part, 0 for others, and which these are, `[Q]`."""
    owned = (target_row >= part.start) & (target_row < part.stop)
    found = torch.zeros(len(scores), dtype=scores.dtype, device=scores.device)
    if not len(part):
        return found, owned
    column = (target_row - part.start).clamp(0, len(part) - 1)
    return torch.where(owned, scores[torch.arange(len(scores), device=scores.device), column], found), owned


def _mid_rank(scores: Tensor, target_score: Tensor, owned: Tensor, exchange: RankSum) -> Tensor:
    """Mid-ranks `[Q]` of scores `[Q, 1]` among this and the other ranks' scores `[Q, n]`."""
    better = (scores > target_score).sum(1)
    equal = (scores == target_score).sum(1) - owned.long()
    counts = exchange.sum(torch.stack([better, equal]).double())
    return 1.0 + counts[0] + 0.5 * counts[1]


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
