"""What can be measured of a fusion space: how close, how spread out, how many directions, whose structure.

Alignment and uniformity are those of Wang and Isola (arXiv 2005.10242), effective rank that of Roy and Vetterli (2007).
All of them are for a sample of the catalog that fits into memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BINS = 12
_LEAST = 20  # pairs that a bin needs to be shown


def pair_cosines(x: Tensor, pairs: np.ndarray) -> np.ndarray:
    """Cosines of pairs of rows of `x [n, E]`, by their places `[pairs, 2]`, float64 `[pairs]`."""
    unit = F.normalize(x.float(), dim=1)
    left, right = torch.from_numpy(pairs).unbind(1)
    return (unit[left] * unit[right]).sum(1).double().numpy()


def alignment(x: Tensor, pairs: np.ndarray) -> float | None:
    """Mean squared distance of pairs that belong together, on the unit sphere; 0 is best, None without pairs.

    Args:
        x: Vectors, `[n, E]`.
        pairs: Places of two rows each, `[pairs, 2]`.

    Example:
        >>> alignment(torch.eye(3), np.array([[0, 1]])), alignment(torch.ones(2, 3), np.array([[0, 1]]))
        (2.0, 0.0)
    """
    return round(float(2 - 2 * pair_cosines(x, pairs).mean()), 6) + 0.0 if len(pairs) else None


def uniformity(x: Tensor, pairs: np.ndarray) -> float:
    """Log of the mean of `exp(-2 d^2)` over random pairs of the unit sphere; 0 for a point.

    Args:
        x: Vectors, `[n, E]`.
        pairs: Places of two random rows each, at least one, `[pairs, 2]`.

    Example:
        >>> uniformity(torch.ones(2, 3), np.array([[0, 1]]))
        0.0
    """
    return round(math.log(np.exp(-4 * (1 - pair_cosines(x, pairs))).mean()), 6) + 0.0


def spectrum(x: Tensor) -> np.ndarray:
    """Shares of the variance by direction, largest first, `[E]`; zeros for vectors that are all equal."""
    centred = x.double() - x.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp(min=0)
    return (values / values.sum().clamp(min=1e-30)).numpy()


def effective_rank(x: Tensor) -> float:
    """Number of directions that the vectors use: the exponential of the entropy of their variance's shares.

    Example:
        >>> round(effective_rank(torch.eye(4)), 3)
        3.0
    """
    shares = spectrum(x)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of `a [n]` and `b [n]`; equal values share their mean rank.

    Example:
        >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
        1.0
    """
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    norm = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return round(float(ranks[0] @ ranks[1]) / norm, 6) if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    found, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place] if len(found) else np.zeros(0)


def structure_bins(titles: np.ndarray, fused: np.ndarray) -> dict[str, list[float]]:
    """How close items are in the fusion space whose titles are this close.

    Args:
        titles: Title cosines of pairs, `[pairs]`.
        fused: Their cosines in the fusion space, `[pairs]`.

    Returns:
        By bin of equal width: its middle `title`, the `median` fused cosine, and its quantiles `low` (0.1) and `high`
        (0.9).
    """
    edges = np.linspace(titles.min(initial=0.0), titles.max(initial=1e-6), _BINS + 1)
    owner = np.clip(np.digitize(titles, edges) - 1, 0, _BINS - 1)
    found: dict[str, list[float]] = {"title": [], "low": [], "median": [], "high": []}
    for place in range(_BINS):
        inside = fused[owner == place]
        if len(inside) < _LEAST:
            continue
        found["title"].append(float(edges[place : place + 2].mean()))
        for name, value in zip(("low", "median", "high"), np.quantile(inside, [0.1, 0.5, 0.9]), strict=True):
            found[name].append(float(value))
    return found


def nearest(x: Tensor, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Places `[q, k]` of the rows of `x [n, E]` closest to some of them `[q]`, itself left out, and their cosines."""
    unit = F.normalize(x.float(), dim=1)
    cosines = unit[queries] @ unit.T
    cosines[torch.arange(len(queries)), torch.from_numpy(queries)] = -2.0
    value, place = cosines.topk(min(k, len(x) - 1), dim=1)
    return place.numpy(), value.numpy()


def movement(z: Tensor, without: Tensor) -> dict[str, Any]:
    """How far vectors turn when something is left out: `1 - cos`, its mean and the quantiles 0.1 and 0.9.

    Args:
        z: Vectors, `[n, E]`.
        without: The same items' vectors without it, `[n, E]`.
    """
    if not len(z):
        return {"items": 0, "mean": None, "low": None, "high": None}
    moved = (1 - F.cosine_similarity(z.float(), without.float(), dim=1)).double().numpy()
    low, high = np.quantile(moved, [0.1, 0.9]).tolist()
    return {"items": len(z), "mean": float(moved.mean()), "low": low, "high": high}
