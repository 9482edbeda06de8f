"""From raw events to the event log: cleaned, coded, sorted by user and time, what is dropped counted by its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from mufasa_rec.data import raw
from mufasa_rec.data.coding import Vocabulary, encode
from mufasa_rec.data.importers.values import flat, is_text
from mufasa_rec.data.schema import Feature

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions
TIE_RULE = "user, then time, then position, then order in the source (stable); a key that the source lacks is left out"


@dataclass(kw_only=True)
class EventLog:
    """Events of all users, user by user, each user's in order.

    Attributes:
        users: User ids, int64 `[U]`, strictly ascending.
        offsets: int64 `[U + 1]`: user u has events ``offsets[u]:offsets[u + 1]``.
        item: Item ids, int64 `[N]`.
        timestamp: int64 `[N]` milliseconds UTC, or None without absolute times.
        columns: ``action`` int32, ``weight`` and ``label`` float32, categoricals int64, each `[N]`.
        vocabularies: Of action and categoricals.
        dropped: Events dropped, by reason.
    """

    users: np.ndarray
    offsets: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray | None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Events per user, int64 `[U]`."""
        return np.diff(self.offsets)

    @property
    def user_of_event(self) -> np.ndarray:
        """Index of the user of each event, int64 `[N]`."""
        return np.repeat(np.arange(self.users.size), self.lengths)

    def features(self, *, user_text: bool, item_text: bool) -> dict[str, Feature]:
        """The features of events, as ``dataset.json`` names them."""
        text: dict[bool, Literal["int64", "string"]] = {True: "string", False: "int64"}
        items = int(pd.unique(self.item).size)
        found = {
            raw.USER: Feature(level="event", kind="id", id_type=text[user_text], cardinality=self.users.size),
            raw.ITEM: Feature(
                level="event", kind="id", id_policy="vocabulary", id_type=text[item_text], cardinality=items
            ),
        }
        for name in self.columns:
            if name in (raw.WEIGHT, raw.LABEL):
                found[name] = Feature(level="event", kind=name)  # type: ignore[arg-type]
                continue
            values = self.vocabularies[name].values
            found[name] = Feature(
                level="event",
                kind="action" if name == raw.ACTION else "categorical",
                id_policy="vocabulary",
                id_type=text[bool(values) and isinstance(values[0], str)],
                cardinality=len(values),
            )
        return found


def drop_nulls(events: pa.Table, max_share: float) -> tuple[pa.Table, dict[str, int]]:
    """Drops events without user, item, time or position.

    Args:
        events: Canonical events.
        max_share: Largest share of nulls in one column that is taken for an accident.

    Returns:
        The rest, and the number of dropped events by reason.

    Raises:
        ValueError: A column has a larger share of nulls.
    """
    dropped: dict[str, int] = {}
    total = events.num_rows
    for name in (raw.USER, raw.ITEM, raw.TIMESTAMP, raw.POSITION):
        if name not in events.column_names or not events[name].null_count:
            continue
        valid = pc.is_valid(events[name])
        count = events.num_rows - pc.sum(valid).as_py()
        if count > max_share * total:
            raise ValueError(
                f"events: {count:,} of {total:,} have no {name} (null or NaN), "
                f"{count / total:.1%} where --max-null-share "
                f"allows {max_share:.1%}; correct the column, or raise the limit to drop them"
            )
        if count:
            dropped[f"no {name}"] = count
            events = events.filter(valid)
    return events, dropped


def build_events(
    events: pa.Table,
    users: np.ndarray,
    items: np.ndarray,
    *,
    absolute_times: bool,
    drop_duplicates: bool = False,
    sort_positions: bool = False,
) -> EventLog:
    """Codes and sorts events whose ids are clean.

    Args:
        events: Canonical events without nulls in ids and order, `[N]` rows.
        users: User ids, int64 `[N]`.
        items: Item ids, int64 `[N]`.
        absolute_times: Keep the times; False uses them for the order only.
        drop_duplicates: Drop events that equal an earlier one in every column.
        sort_positions: Accept positions that do not ascend within a user in the source's order.

    Raises:
        ValueError: A label is not 0 or 1, a weight is negative or missing, or positions contradict the order.
    """
    columns, vocabularies = _coded_columns(events)
    keys = {name: _numbers(events[name]) for name in (raw.TIMESTAMP, raw.POSITION) if name in events.column_names}
    dropped: dict[str, int] = {}
    if drop_duplicates:
        frame = pd.DataFrame({raw.USER: users, raw.ITEM: items, **keys, **columns})
        keep = np.flatnonzero(~frame.duplicated().to_numpy())
        if keep.size < users.size:
            dropped["exact duplicate"] = users.size - keep.size
        users, items = users[keep], items[keep]
        keys, columns = ({name: array[keep] for name, array in group.items()} for group in (keys, columns))
    if raw.POSITION in keys and not sort_positions:
        _check_positions(users, keys[raw.POSITION])
    order = np.lexsort((*reversed(keys.values()), users))
    if raw.POSITION in keys:
        _check_order(users[order], keys[raw.POSITION][order], raw.TIMESTAMP in keys)
    users = users[order]
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    return EventLog(
        users=users[starts],
        offsets=np.r_[starts, users.size],
        item=items[order],
        timestamp=keys[raw.TIMESTAMP][order] if absolute_times else None,
        columns={name: array[order] for name, array in columns.items()},
        vocabularies=vocabularies,
        dropped=dropped,
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return flat(column).to_numpy(zero_copy_only=False)


def _coded_columns(events: pa.Table) -> tuple[dict[str, np.ndarray], dict[str, Vocabulary]]:
    columns: dict[str, np.ndarray] = {}
    vocabularies: dict[str, Vocabulary] = {}
    for name in events.column_names:
        if name in (raw.USER, raw.ITEM, raw.TIMESTAMP, raw.POSITION):
            continue
        if name in (raw.WEIGHT, raw.LABEL):
            columns[name] = _checked_numbers(name, _numbers(events[name]).astype(np.float64))
            continue
        column = flat(events[name])
        if not (is_text(column.type) or pa.types.is_integer(column.type)):
            raise ValueError(
                f"events: categorical {name!r} is {column.type}; an event has one integer or text per column"
            )
        codes, vocabularies[name] = encode(column, name)
        columns[name] = codes if name == raw.ACTION else codes.astype(np.int64)
    return columns, vocabularies


def _checked_numbers(name: str, values: np.ndarray) -> np.ndarray:
    if name == raw.LABEL:
        wrong = values[(values != 0) & (values != 1)]
        if wrong.size:
            raise ValueError(
                f"events: label is {wrong[0]} in {wrong.size:,} of {values.size:,} events, must be 0 or 1; "
                "make it one with --columns.label-at-least (4 for ratings), or name another column"
            )
    elif not (values >= 0).all() or not np.isfinite(values).all():
        wrong = values[~(values >= 0) | ~np.isfinite(values)]
        raise ValueError(
            f"events: weight is {wrong[0]} in {wrong.size:,} events, must be a number of at least 0; correct it"
        )
    return values.astype(np.float32)


def _check_positions(users: np.ndarray, positions: np.ndarray) -> None:
    """Refuses positions that fall within a user in the source's order."""
    order = np.argsort(users, kind="stable")
    user, position = users[order], positions[order]
    wrong = np.flatnonzero((user[1:] == user[:-1]) & (position[1:] < position[:-1]))
    if wrong.size:
        first = order[wrong[0] + 1]
        raise ValueError(
            f"events: position does not ascend within its user in {wrong.size:,} events (first: "
            f"event {first + 1:,} has "
            f"{positions[first]} after {position[wrong[0]]}); sort the source, or use "
            "--sort-positions to let prepare do it"
        )


def _check_order(users: np.ndarray, positions: np.ndarray, timed: bool) -> None:
    """Refuses positions that are not strictly ascending in the final order."""
    step = np.diff(positions)
    same = users[1:] == users[:-1]
    equal = int((same & (step == 0)).sum())
    if equal:
        raise ValueError(
            f"events: {equal:,} events have the same position as another of their user; number "
            "them 0, 1, 2, ... or leave "
            "the column out to keep the source's order"
        )
    if timed and (same & (step < 0)).any():
        count = int((same & (step < 0)).sum())
        raise ValueError(
            f"events: position and time contradict each other in {count:,} events; name one of "
            "them with --columns.time or "
            "--columns.position and remove the other column"
        )
