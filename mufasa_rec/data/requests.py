"""Requests: what was shown to a user at one time, with labels, and how much of the history lies strictly before it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mufasa_rec.data import raw
from mufasa_rec.data.catalog import numeric_ids
from mufasa_rec.data.coding import Vocabulary, encode
from mufasa_rec.data.importers.values import flat
from mufasa_rec.data.raw import RawImpressions
from mufasa_rec.data.schema import DenseInfo

CANDIDATE, IMPRESSION, WEIGHT = "candidate", "impression", "candidate_weight"


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests sorted by user and time, their impressions end to end.

    Attributes:
        user: User of each request, `[R]` int64 id.
        time: `[R]` int64 milliseconds; of the earliest impression where those of a request differ.
        request: The source's number of the request (the hash of its text, its place here without one), `[R]` int64.
        offsets: Impressions of each request, `[R + 1]` int64.
        columns: ``candidate`` int64 item ids, ``impression`` int64 (the row in the source), ``label.<task>`` float32,
            ``candidate_weight`` float32, ``context.<name>`` int64 codes, ``dense.<name>`` float32 (NaN is missing),
            each `[C]`.
        order: Source row of each impression, `[C]`.
        vocabularies: Of the context.
    """

    user: np.ndarray
    time: np.ndarray
    request: np.ndarray
    offsets: np.ndarray
    columns: dict[str, np.ndarray]
    order: np.ndarray
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)

    @property
    def sizes(self) -> np.ndarray:
        """Impressions of each request, `[R]`."""
        return np.diff(self.offsets)

    def names(self, prefix: str) -> list[str]:
        """Names of the columns with a prefix, without it."""
        return [name.removeprefix(prefix) for name in self.columns if name.startswith(prefix)]


def group_requests(impressions: RawImpressions, users: np.ndarray, items: np.ndarray) -> Requests:
    """Groups impressions into requests.

    Args:
        impressions: The impressions, `[C]` rows.
        users: Their user ids, int64 `[C]`.
        items: Their item ids, int64 `[C]`.

    Returns:
        The requests; impressions keep the source's order within each.
    """
    table = impressions.table
    time = _numbers(table, raw.TIMESTAMP).astype(np.int64)
    key = time
    if raw.REQUEST in table.column_names:
        key = numeric_ids(flat(table[raw.REQUEST]))
    # A request is dated by its earliest impression: nothing that came after that one may be known.
    by_key = np.lexsort((time, key, users))
    first = np.flatnonzero(_changes(users[by_key], key[by_key]))
    sizes = np.diff(np.r_[first, len(by_key)])
    dated = np.empty_like(time)
    dated[by_key] = np.repeat(time[by_key][first], sizes)
    order = np.lexsort((np.arange(len(time)), key, dated, users))
    first = np.flatnonzero(_changes(users[order], key[order]))
    columns, vocabularies = _columns(impressions, items)
    request = key[order][first] if raw.REQUEST in table.column_names else np.arange(len(first), dtype=np.int64)
    return Requests(
        user=users[order][first],
        time=dated[order][first],
        request=request,
        offsets=np.r_[first, len(order)].astype(np.int64),
        columns={name: values[order] for name, values in columns.items()} | {IMPRESSION: order.astype(np.int64)},
        order=order,
        vocabularies=vocabularies,
    )


def events_before(
    request_user: np.ndarray, request_time: np.ndarray, event_user: np.ndarray, event_time: np.ndarray
) -> np.ndarray:
    """Events of each request's user that are strictly before the request: one at its very time is not known yet.

    Args:
        request_user: User of each request, `[R]`.
        request_time: `[R]`.
        event_user: User of each event, `[N]`.
        event_time: `[N]`.

    Returns:
        int64 `[R]`.

    Example:
        >>> events_before(np.array([1, 1]), np.array([5, 6]), np.array([1, 1, 2]), np.array([3, 5, 1])).tolist()
        [1, 2]
    """
    user, time = np.concatenate([request_user, event_user]), np.concatenate([request_time, event_time])
    is_event = np.arange(len(user)) >= len(request_user)
    order = np.lexsort((is_event, time, user))
    total = np.cumsum(is_event[order])
    seen = np.empty(len(user), np.int64)
    seen[order] = total
    earlier_users = np.searchsorted(np.sort(event_user), request_user)
    return seen[: len(request_user)] - earlier_users


def dense_info(requests: Requests, training: np.ndarray) -> dict[str, DenseInfo]:
    """Mean and standard deviation of each number over the training impressions; `training [C]` bool."""
    found = {}
    for name in requests.names(raw.DENSE_PREFIX):
        values = requests.columns[raw.DENSE_PREFIX + name][training].astype(np.float64)
        values = values[np.isfinite(values)]
        mean, std = (float(values.mean()), float(values.std())) if values.size else (0.0, 1.0)
        found[name] = DenseInfo(mean=mean, std=std or 1.0)
    return found


def _changes(user: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a new (user, key) begins in sorted columns."""
    return np.r_[True, (user[1:] != user[:-1]) | (key[1:] != key[:-1])][: len(user)]


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return flat(table[name]).to_numpy(zero_copy_only=False)


def _columns(impressions: RawImpressions, items: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Vocabulary]]:
    """Coded columns in the source's order, and the vocabularies of the context."""
    table = impressions.table
    columns: dict[str, np.ndarray] = {CANDIDATE: items}
    vocabularies = {}
    for task in impressions.names(raw.LABEL_PREFIX):
        columns[raw.LABEL_PREFIX + task] = _numbers(table, raw.LABEL_PREFIX + task).astype(np.float32)
    if raw.WEIGHT in table.column_names:
        columns[WEIGHT] = _numbers(table, raw.WEIGHT).astype(np.float32)
    for name in impressions.names(raw.CONTEXT_PREFIX):
        feature = raw.CONTEXT_PREFIX + name
        codes, vocabularies[feature] = encode(flat(table[feature]), feature)
        columns[feature] = codes.astype(np.int64)
    for name in impressions.names(raw.DENSE_PREFIX):
        columns[raw.DENSE_PREFIX + name] = _numbers(table, raw.DENSE_PREFIX + name).astype(np.float32)
    return columns, vocabularies
