"""From ranks to the numbers people read: metrics with intervals, slices, coverage, paired differences, histograms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mufasa_rec.data.item_columns import ItemColumn
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.evaluation.ranks import Ranked, bootstrap_interval, gains

FEW_EVENTS = 5
_FEW = f"≤ {FEW_EVENTS} training events"
_COLD = "no training event"
_HISTORY_BORDERS = (50, 200)


def slices_of(
    ranked: Ranked, catalog: ItemLookup, all_stores: Mapping[str, np.ndarray | ItemColumn]
) -> dict[str, np.ndarray]:
    """Which users belong to which slice, `[Q]` bool by name.

    Args:
        ranked: Ranks of the targets.
        catalog: Items, with their training counts.
        all_stores: Per modality of the data set the content row of each item, -1 where missing.
    """
    count = catalog.counts[ranked.target_row]
    low, high = _HISTORY_BORDERS
    length = ranked.history_length
    found = {
        _FEW: count <= FEW_EVENTS,
        _COLD: count == 0,
        f"history under {low}": length < low,
        f"history {low} to {high - 1}": (length >= low) & (length < high),
        f"history of {high} and more": length >= high,
    }
    for name, rows in sorted(all_stores.items()):
        has = rows[ranked.target_row] >= 0
        found[f"target has {name}"] = has
        found[f"target without {name}"] = ~has
    return found


def summarise(
    name: str, ranked: Ranked, catalog: ItemLookup, all_stores: Mapping[str, np.ndarray | ItemColumn], seconds: float
) -> dict[str, Any]:
    """One row of `evaluation.json`.

    Args:
        name: Name of the row.
        ranked: Ranks of the targets.
        catalog: Items.
        all_stores: See `slices_of`.
        seconds: Time to train (or count) and rank.
    """
    gain = gains(ranked.rank)
    row: dict[str, Any] = {"row": name, **{key: _mean(values) for key, values in gain.items()}}
    for key in ("hr@10", "ndcg@10"):
        row[f"{key}_low"], row[f"{key}_high"] = bootstrap_interval(gain[key])
    shown = np.unique(ranked.top[ranked.top >= 0])
    row["coverage"] = len(shown) / len(catalog)
    masks = slices_of(ranked, catalog, all_stores)
    row["few_hr@10"], row["cold_hr@10"] = (_mean(gain["hr@10"][masks[key]]) for key in (_FEW, _COLD))
    row["cold_among_hr@10"] = _mean((ranked.cold_rank[masks[_COLD]] <= 10).astype(float))  # chance: 10 / cold items
    row["users"], row["seconds"] = len(ranked.rank), seconds
    row["slices"] = {
        key: {"users": int(mask.sum()), "hr@10": _mean(gain["hr@10"][mask]), "ndcg@10": _mean(gain["ndcg@10"][mask])}
        for key, mask in masks.items()
        if mask.any()
    }
    return row


def paired(name: str, better: Ranked, worse: Ranked) -> dict[str, Any]:
    """Mean paired difference of NDCG@10 over users, with its 95 % paired-bootstrap interval.

    Raises:
        ValueError: When the two did not rank the same users' targets.
    """
    if not (np.array_equal(better.user, worse.user) and np.array_equal(better.target_row, worse.target_row)):
        raise ValueError(f"{name}: the two rows rank different users or targets and cannot be compared.")
    difference = gains(better.rank)["ndcg@10"] - gains(worse.rank)["ndcg@10"]
    low, high = bootstrap_interval(difference)
    return {"pair": name, "ndcg@10_difference": _mean(difference), "low": low, "high": high}


def histograms(ranked: Ranked, counts: np.ndarray) -> dict[str, dict[str, list]]:
    """Histograms on powers of two: events before the target, and training events per item."""
    return {"history_length": _histogram(ranked.history_length), "item_popularity": _histogram(counts)}


def _histogram(values: np.ndarray) -> dict[str, list]:
    top = int(np.ceil(np.log2(max(int(values.max(initial=1)), 1) + 1)))
    edges = [0, *(2**power for power in range(top + 1))]
    counts, _ = np.histogram(values, bins=[*edges[:-1], max(edges[-1], edges[-2] + 1)])
    return {"edges": edges, "counts": counts.tolist()}


def _mean(values: np.ndarray) -> float | None:
    """Mean, or None (null in JSON) of nothing."""
    return float(values.mean()) if len(values) else None
