"""The checks of single Parquet files: events, rows that reference them, rows with their own lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from mufasa_rec.data import paths, raw
from mufasa_rec.data.event_files import ROWS_SCHEMA
from mufasa_rec.data.importers.values import flat, is_list
from mufasa_rec.data.items import ItemStore
from mufasa_rec.data.schema import DatasetManifest, Feature

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions
Say = Callable[[str], None]
_TYPES = {raw.ITEM: pa.int64(), raw.TIMESTAMP: pa.int64(), raw.ACTION: pa.int32(), raw.WEIGHT: pa.float32()}
_TYPES[raw.LABEL] = pa.float32()


@dataclass(frozen=True)
class EventFile:
    """What rows may refer to.

    Attributes:
        users: Users of the file in its order, int64 `[k]`.
        lengths: Events per user, int64 `[k]`.
        bounds: int64 `[groups + 1]`: users of row group g are ``users[bounds[g]:bounds[g + 1]]``.
    """

    users: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray


def _expected_columns(manifest: DatasetManifest) -> dict[str, pa.DataType]:
    names = [name for name, f in manifest.features.items() if f.level == "event" and name != raw.USER]
    if manifest.time.absolute:
        names.append(raw.TIMESTAMP)
    return {name: _TYPES.get(name, pa.int64()) for name in names}


def _check_schema(schema: pa.Schema, manifest: DatasetManifest, say: Say) -> bool:
    """Whether every column is there with its type; says which are not."""
    wrong = []
    if raw.USER not in schema.names or schema.field(raw.USER).type != pa.int64():
        wrong.append("column 'user' must be there and int64")
    for name, kind in _expected_columns(manifest).items():
        if name not in schema.names:
            wrong.append(f"column {name!r} of dataset.json is missing; write it as list<{kind}>")
        elif not is_list(schema.field(name).type) or schema.field(name).type.value_type != kind:
            wrong.append(f"column {name!r} is {schema.field(name).type}; write it as list<{kind}>")
    for message in wrong:
        say(message)
    return not wrong


def _groups(url: str) -> tuple[pq.ParquetFile, Iterator[pa.Table]]:
    file = pq.ParquetFile(paths.local_copy(url))
    return file, (file.read_row_group(k) for k in range(file.num_row_groups))


def check_event_file(url: str, manifest: DatasetManifest, items: ItemStore | None, say: Say) -> EventFile:
    """Checks an events file.

    Raises:
        ValueError: The file's columns are such that nothing more can be checked.
    """
    file, groups = _groups(url)
    if not _check_schema(file.schema_arrow, manifest, say):
        raise ValueError("the columns are not those of dataset.json; the content was not checked")
    users, lengths, bounds = [], [], [0]
    for table in groups:
        users.append(_users(table, say))
        lengths.append(_check_lists(table, manifest, items, say))
        bounds.append(bounds[-1] + table.num_rows)
    every = np.concatenate(users) if users else np.zeros(0, np.int64)
    if not (np.diff(every) > 0).all():
        say("users are not strictly ascending; sort the rows by user, one row per user")
    return EventFile(every, np.concatenate(lengths) if lengths else every, np.asarray(bounds))


def _users(table: pa.Table, say: Say) -> np.ndarray:
    column = flat(table[raw.USER])
    if column.null_count:
        say(f"{column.null_count} users are null; drop those rows")
        column = column.fill_null(0)
    return column.to_numpy(zero_copy_only=False)


def _check_lists(table: pa.Table, manifest: DatasetManifest, items: ItemStore | None, say: Say) -> np.ndarray:
    """Checks the list columns of one row group; returns the length of each row's lists, int64 `[rows]`."""
    lengths = pc.list_value_length(flat(table[raw.ITEM])).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if (lengths == 0).any() and manifest.impressions is None:
        say(f"{int((lengths == 0).sum())} rows have no event; drop them")
    for name in _expected_columns(manifest):
        column = flat(table[name])
        own = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        values = column.flatten()
        if column.null_count or values.null_count:
            say(f"column {name!r} has nulls; use 0 for a missing code and drop events without item or time")
        elif (own != lengths).any():
            say(f"column {name!r} has lists of other lengths than 'item'; write one value per event")
        else:
            _check_values(name, values.to_numpy(zero_copy_only=False), lengths, manifest, items, say)
    return lengths


def _check_values(
    name: str,
    values: np.ndarray,
    lengths: np.ndarray,
    manifest: DatasetManifest,
    items: ItemStore | None,
    say: Say,
) -> None:
    if name == raw.ITEM and items is not None:
        unknown = values[items.rows_of(values) < 0]
        if unknown.size:
            say(
                f"{unknown.size:,} events have an item that is not in the item store (first: "
                f"{unknown[0]}); add the items"
            )
    elif name == raw.TIMESTAMP:
        first = np.zeros(values.size, bool)
        first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        back = int(((np.diff(values) < 0) & ~first[1:]).sum())
        if back:
            say(f"timestamp falls within a user at {back:,} events; sort each user's events by time")
    elif name == raw.LABEL:
        wrong = values[(values != 0) & (values != 1)]
        if wrong.size:
            say(f"label is {wrong[0]} in {wrong.size:,} events, must be 0 or 1; correct it")
    elif name == raw.WEIGHT:
        wrong = values[~(values >= 0) | ~np.isfinite(values)]
        if wrong.size:
            say(f"weight is {wrong[0]} in {wrong.size:,} events, must be a number of at least 0; correct it")
    elif name != raw.ITEM:
        _check_codes(name, values, manifest.features[name], say)


def _check_codes(name: str, values: np.ndarray, feature: Feature, say: Say) -> None:
    if feature.id_policy != "vocabulary":
        return
    wrong = values[(values < 0) | (values > feature.cardinality)]
    if wrong.size:
        say(
            f"{name} is {wrong[0]} in {wrong.size:,} events, outside 0..{feature.cardinality}; "
            "code it by its vocabulary"
        )


def check_rows_file(url: str, events: EventFile, say: Say, ends: dict[int, int], *, training: bool) -> tuple[int, int]:
    """Checks rows that reference events.

    Args:
        url: The rows file.
        events: The events file of the same name.
        say: Takes each problem.
        ends: Largest history_end of each user's training rows: filled from training rows, checked for the others.
        training: Whether these are training rows.

    Returns:
        Numbers of rows and targets.
    """
    file, groups = _groups(url)
    if file.schema_arrow.remove_metadata() != ROWS_SCHEMA:
        say("columns must be user int64, history_end int32, target_from int32")
        return 0, 0
    if file.num_row_groups != events.bounds.size - 1:
        say(
            f"has {file.num_row_groups} row groups, its events file has {events.bounds.size - 1}; row group g must "
            "reference users of row group g only (an empty group where there are none)"
        )
        return 0, 0
    rows = targets = 0
    for group, table in enumerate(groups):
        user, end, start = (flat(table[name]).to_numpy(zero_copy_only=False) for name in ROWS_SCHEMA.names)
        span = slice(events.bounds[group], events.bounds[group + 1])
        _check_references(group, (user, end, start), events.users[span], events.lengths[span], say)
        for one, stop, first in zip(user.tolist(), end.tolist(), start.tolist(), strict=True):
            if training:
                ends[one] = max(ends.get(one, 0), stop)
            elif first < ends.get(one, 0):
                say("a target is also a training event of its user; make the split again")
                break
        rows, targets = rows + user.size, targets + int((end - start).sum())
    return rows, targets


def _check_references(
    group: int, rows: tuple[np.ndarray, np.ndarray, np.ndarray], users: np.ndarray, lengths: np.ndarray, say: Say
) -> None:
    user, end, start = rows
    if not user.size:
        return
    place = np.minimum(np.searchsorted(users, user), max(users.size - 1, 0))
    known = users[place] == user if users.size else np.zeros(user.size, bool)
    if not known.all():
        say(
            f"row group {group}: {int((~known).sum()):,} rows have a user that is not in row "
            f"group {group} of the events"
        )
        return
    wrong = (start < 1) | (start >= end) | (end > lengths[place])
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        say(
            f"row group {group}: {int(wrong.sum()):,} rows are out of range (first: history_end "
            f"{end[first]}, target_from "
            f"{start[first]}, the user has {lengths[place][first]} events); 1 <= target_from < history_end <= events"
        )
    if (np.lexsort((end, user)) != np.arange(user.size)).any():
        say(f"row group {group}: rows are not sorted by user and history_end; sort them")


def check_list_file(url: str, manifest: DatasetManifest, items: ItemStore | None, say: Say) -> tuple[int, int]:
    """Checks rows that carry their own lists; ``target_from`` is 1 where the column is left out.

    Returns:
        Numbers of rows and targets.
    """
    file, groups = _groups(url)
    if not _check_schema(file.schema_arrow, manifest, say):
        return 0, 0
    rows = targets = 0
    for table in groups:
        _users(table, say)
        lengths = _check_lists(table, manifest, items, say)
        start = np.ones(lengths.size, np.int64)
        if "target_from" in table.column_names:
            start = flat(table["target_from"]).to_numpy(zero_copy_only=False).astype(np.int64)
        wrong = (start < 1) | (start >= lengths)
        if wrong.any():
            say(f"{int(wrong.sum()):,} rows have a target_from outside 1 <= target_from < number of events; correct it")
        rows, targets = rows + lengths.size, targets + int((lengths - start).sum())
    return rows, targets
