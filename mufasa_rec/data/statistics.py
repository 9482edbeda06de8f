"""What a data set looks like in numbers: lengths, popularity, repeats, ties, and each feature's nulls and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from mufasa_rec.data import raw
from mufasa_rec.data.catalog import Catalog
from mufasa_rec.data.events import EventLog
from mufasa_rec.data.items import Categorical
from mufasa_rec.data.splits import Rows

_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Minimum, 10, 50, 90 and 99 % quantile, maximum (each a value that occurs) and mean; empty for no values."""
    if not values.size:
        return {}
    found = np.quantile(values, list(_QUANTILES.values()), method="lower")
    return {name: value.item() for name, value in zip(_QUANTILES, found, strict=True)} | {"mean": float(values.mean())}


def repeated_events(log: EventLog) -> np.ndarray:
    """Whether the user had the item before, bool `[N]`."""
    user = log.user_of_event
    order = np.lexsort((log.item, user))  # stable: equal pairs stay in the order of events
    same = (user[order][1:] == user[order][:-1]) & (log.item[order][1:] == log.item[order][:-1])
    repeated = np.zeros(log.item.size, bool)
    repeated[order[1:][same]] = True
    return repeated


def target_events(rows: Rows, log: EventLog) -> np.ndarray:
    """Index of each row's first target in the event log, int64 `[R]`."""
    return log.offsets[rows.user] + rows.target_from


def repeat_share(log: EventLog, repeated: np.ndarray) -> float:
    """Share of possible targets (every event but a user's first) that are repeats."""
    first = np.zeros(log.item.size, bool)
    first[log.offsets[:-1][log.lengths > 0]] = True
    targets = int((~first).sum())
    return float(repeated[~first].sum() / targets) if targets else 0.0


def tie_share(log: EventLog) -> float | None:
    """Share of events at the same time as the user's event before; None without times."""
    if log.timestamp is None:
        return None
    user = log.user_of_event
    tied = (log.timestamp[1:] == log.timestamp[:-1]) & (user[1:] == user[:-1])
    return float(tied.sum() / max(1, log.item.size))


def event_statistics(log: EventLog) -> dict[str, Any]:
    """Statistics of each event column, by feature."""
    found: dict[str, Any] = {}
    for name, values in log.columns.items():
        if name in (raw.WEIGHT, raw.LABEL):
            found[name] = {"null_share": 0.0, "quantiles": quantiles(values)}
        else:
            found[name] = _codes(values, len(log.vocabularies[name].values))
    return found


def item_statistics(catalog: Catalog) -> dict[str, Any]:
    """Statistics of each item column, by feature."""
    return {name: _categorical(column) for name, column in catalog.categoricals.items()}


def _codes(codes: np.ndarray, cardinality: int) -> dict[str, Any]:
    missing = float((codes == 0).mean()) if codes.size else 0.0
    counts = np.bincount(codes, minlength=cardinality + 1)[1:]
    return {
        "null_share": missing,
        "coverage": 1.0 - missing,
        "cardinality": cardinality,
        "uses_per_value": quantiles(counts),
    }


def _categorical(column: Categorical) -> dict[str, Any]:
    if column.offsets is None:
        return _codes(column.values, column.cardinality)
    lengths = np.diff(column.offsets)
    missing = float((lengths == 0).mean()) if lengths.size else 0.0
    found = _codes(column.values, column.cardinality)
    return found | {"null_share": missing, "coverage": 1.0 - missing, "values_per_item": quantiles(lengths)}


def summary(log: EventLog, catalog: Catalog) -> dict[str, Any]:
    """The statistics that go into ``dataset.json`` and the report."""
    counts = np.bincount(np.searchsorted(catalog.ids, log.item), minlength=catalog.ids.size)
    found: dict[str, Any] = {
        "users": int(log.users.size),
        "items": int(catalog.ids.size),
        "items_with_events": int((counts > 0).sum()),
        "events": int(log.item.size),
        "events_per_user": quantiles(log.lengths),
        "events_per_item": quantiles(counts[counts > 0]),
        "items_only_in_events": catalog.added,
        "tie_share": tie_share(log),
        "features": event_statistics(log) | item_statistics(catalog),
    }
    if catalog.titles is not None:
        nulls = catalog.titles.null_count / max(1, len(catalog.titles))
        found["features"]["title"] = {"null_share": nulls, "coverage": 1.0 - nulls}
    return found
