"""The form between importers and ``prepare``: one events table, one items table, vectors by modality.

An importer (or the synthetic generator) renames a source's columns to the names below and converts times; it neither
sorts, drops nor codes. Everything after that is the same for every source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

# Column names of the events table that have a meaning; every other column of it is a categorical of the event.
USER, ITEM, TIMESTAMP, POSITION, ACTION, WEIGHT, LABEL = (
    "user",
    "item",
    "timestamp",
    "position",
    "action",
    "weight",
    "label",
)
EVENT_COLUMNS = (USER, ITEM, TIMESTAMP, POSITION, ACTION, WEIGHT, LABEL)
# Column names of the items table that have a meaning; every other column of it is a categorical of the item.
ITEM_ID, TITLE, AVAILABLE_FROM, AVAILABLE_TO = "item", "title", "available_from", "available_to"
ITEM_COLUMNS = (ITEM_ID, TITLE, AVAILABLE_FROM, AVAILABLE_TO)

# Column names of the impressions table; beside them `label.<task>`, `context.<name>`, `dense.<name>`.
REQUEST, HISTORY_ITEM, HISTORY_TIME = "request", "history_item", "history_timestamp"
LABEL_PREFIX, CONTEXT_PREFIX, DENSE_PREFIX = "label.", "context.", "dense."


@dataclass(frozen=True, kw_only=True)
class RawImpressions:
    """Impressions of a source in canonical form.

    Attributes:
        table: One row per impression. Columns: ``user``, ``item`` (int64 or string), ``timestamp`` (int64 milliseconds
            UTC); ``label.<task>`` (float) for each task; optional ``request`` (int64 or string; without it user and
            time make a request), ``weight`` (float), ``context.<name>`` (categorical), ``dense.<name>`` (float), and an
            own history: ``history_item`` (list of ids, oldest first), ``history_timestamp`` (list of milliseconds).
        negative_rate: Share of its negatives that the source kept.
        are_events: Whether the events of the source are impressions of this table.
        oracle: Of a generated source the true probability of the first task, float64 `[n]`.
    """

    table: pa.Table
    negative_rate: float = 1.0
    are_events: bool = False
    oracle: np.ndarray | None = None

    def names(self, prefix: str) -> tuple[str, ...]:
        """Names of the columns with a prefix, without it."""
        return tuple(name.removeprefix(prefix) for name in self.table.column_names if name.startswith(prefix))

    @property
    def own_history(self) -> bool:
        """Whether every impression brings its own history."""
        return HISTORY_ITEM in self.table.column_names


@dataclass(frozen=True, kw_only=True)
class RawData:
    """A source in canonical form, in memory.

    Attributes:
        name: Name of the data set.
        events: One row per event, in the source's order. Columns: ``user``, ``item`` (int64 or string); optional
            ``timestamp`` (int64 milliseconds UTC), ``position`` (int64), ``action`` (string or integer), ``weight``
            (float), ``label`` (float); any other column is a categorical (string or integer).
        items: One row per item, or None. Columns: ``item``; optional ``title`` (string), ``available_from``,
            ``available_to`` (int64 milliseconds UTC); any other column is a categorical: string or integer, or a list
            of them (multi-valued).
        vectors: Modality to a vector file (path or URL), or to (ids int64 `[n]`, vectors float `[n, P]`).
        absolute_times: Whether ``timestamp`` is real time; False when it only orders events.
        timezone: The zone that naive local times were read in.
        choices: Lines for the report: which source column was taken for what.
        ignored: Source columns that were not used, with the reason.
        dropped: Events that the importer already dropped, by reason.
        fingerprint: Hash of the source; a data set made from the same source may be replaced.
        impressions: Items that were shown, with labels; None for data without.
        oracle: Of a generated source, what the true distribution says of each user's last event: ``user`` int64 `[u]`,
            ``rank`` float64 `[u]`, ``top`` int64 `[u, k]` item ids.
        notes: Anything JSON that should be kept in ``report.json`` (a generator's parameters).
    """

    name: str
    events: pa.Table
    items: pa.Table | None = None
    vectors: dict[str, str | tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    absolute_times: bool = False
    timezone: str | None = None
    choices: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    impressions: RawImpressions | None = None
    oracle: dict[str, np.ndarray] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
