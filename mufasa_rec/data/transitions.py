"""Quantiles over the training split's transitions, from one event of a user to the next: thresholds of blocks.

Only events that are trained on count, so that nothing is learned from validation or test. Every rank computes the same
number from the same row groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mufasa_rec.data.collate import ragged_arange
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.parquet import RowGroup, RowGroupReader, RowGroupRef

_MAX_GROUPS = 64  # a quantile of a million transitions needs no more


def gap_quantile(groups: Sequence[RowGroupRef], quantile: float) -> float:
    """Quantile of the seconds between consecutive training events.

    Args:
        groups: Row groups of the training part; of many, evenly spaced ones are read.
        quantile: Which, in (0, 1).

    Returns:
        Seconds; 0 where no user has two events.
    """
    found = []
    for group, now in _transitions(groups, ("item", "timestamp")):
        times = group.columns["timestamp"]
        found.append(times[now] - times[now - 1])
    return _quantile(found, quantile, 0.0) / 1000.0


def cosine_quantile(groups: Sequence[RowGroupRef], catalog: ItemLookup, modality: str, quantile: float) -> float:
    """Quantile of the cosine between the contents of consecutive training events.

    Args:
        groups: Row groups of the training part; of many, evenly spaced ones are read.
        catalog: Items of the data set, with the modality.
        modality: Content that is compared; pairs in which it is missing do not count.
        quantile: Which, in (0, 1).

    Returns:
        The cosine; -1 where there is no pair.
    """
    content_row, store = catalog.content_rows[modality], catalog.stores[modality]
    found = []
    for group, now in _transitions(groups, ("item",)):
        rows = content_row[catalog.rows_of(group.columns["item"])]
        before, after = rows[now - 1], rows[now]
        both = (before >= 0) & (after >= 0)
        used, place = np.unique(np.r_[before[both], after[both]], return_inverse=True)
        vectors = store.gather(used)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        first, second = np.split(place, 2)
        found.append(np.einsum("ij,ij->i", vectors[first], vectors[second]))
    return _quantile(found, quantile, -1.0)


def _transitions(groups: Sequence[RowGroupRef], columns: tuple[str, ...]) -> Iterator[tuple[RowGroup, np.ndarray]]:
    """Row groups, and the places in their columns of all training targets that have an event before."""
    reader = RowGroupReader(columns)
    for ref in groups[:: max(1, len(groups) // _MAX_GROUPS)]:
        group = reader.read(ref)
        begin = np.maximum(group.target_from, 1)
        lengths = np.maximum(group.history_end - begin, 0)
        yield group, np.repeat(group.stream_start + begin, lengths) + ragged_arange(lengths)


def _quantile(parts: list[np.ndarray], quantile: float, nothing: float) -> float:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(np.quantile(values, quantile, method="lower")) if len(values) else nothing
