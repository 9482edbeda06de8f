"""Impressions of a source: what was shown to whom and when, with labels; with or without an own history column.

One row per impression. `impressions.*` in a source's folder is taken by itself; `columns.impressions.source: events`
takes the events file (ratings, say) for impressions too. Where the source has no events file, the clicks among the
impressions are the events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute

from mufasa_rec.data import raw
from mufasa_rec.data.importers import values
from mufasa_rec.data.importers.files import read_table, table_schema
from mufasa_rec.data.importers.impression_columns import ImpressionsConfig
from mufasa_rec.data.raw import RawImpressions

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions
_TASK = "click"
_FLAG = "--columns.impressions."


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Columns of user, item and time, and how times are read."""

    user: str
    item: str
    time: str | None
    unit: str
    timezone: str | None


def read_impressions(
    urls: list[str], config: ImpressionsConfig, roles: Roles, where: str
) -> tuple[RawImpressions, list[str]]:
    """Reads impressions into canonical columns.

    Args:
        urls: Their files.
        config: What the columns mean.
        roles: Columns of user, item, time.
        where: Name of the file, for messages.

    Returns:
        The impressions, and lines for the report.

    Raises:
        ValueError: A column is missing, has nulls where it may not, or labels are not 0 or 1; names file, column and
            remedy.
    """
    if roles.time is None:
        raise ValueError(
            f"{where}: no column for the time of an impression, where the history must be cut and by which the data is "
            "split; name it with --columns.time"
        )
    present = table_schema(urls[0]).names
    labels = config.labels or _usual_label(present, where)
    wanted = [roles.user, roles.item, roles.time, *labels.values(), *config.context, *config.dense]
    wanted += [name for name in (config.request, config.weight, config.history_item, config.history_time) if name]
    for name in wanted:
        if name not in present:
            raise ValueError(
                f"{where}: column {name!r} is missing; the file has {', '.join(present)}; name the right one with "
                f"{_FLAG}labels, -request, -context, -dense, -weight, -history-item, -history-time"
            )
    tables = [read_table(url, wanted) for url in urls]
    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    place = f"{where}: column "
    out: dict[str, Any] = {
        raw.USER: _complete(values.id_column(table[roles.user], f"{place}{roles.user!r}"), f"{place}{roles.user!r}"),
        raw.ITEM: _complete(values.id_column(table[roles.item], f"{place}{roles.item!r}"), f"{place}{roles.item!r}"),
    }
    times, note = values.time_column(table[roles.time], f"{place}{roles.time!r}", roles.unit, roles.timezone)
    out[raw.TIMESTAMP] = _complete(times, f"{place}{roles.time!r}")
    for task, column in labels.items():
        out[raw.LABEL_PREFIX + task] = _label(table[column], f"{place}{column!r}", config.label_at_least.get(task))
    if config.request:
        at = f"{place}{config.request!r}"
        out[raw.REQUEST] = _complete(values.id_column(table[config.request], at), at)
    if config.weight:
        out[raw.WEIGHT] = _weight(table[config.weight], f"{place}{config.weight!r}")
    for name in config.context:
        out[raw.CONTEXT_PREFIX + name] = values.categorical_column(table[name], f"{place}{name!r}")
    for name in config.dense:
        out[raw.DENSE_PREFIX + name] = values.number_column(table[name], f"{place}{name!r}")
    if config.history_item:
        out |= _history(table, config, roles, place)
    choices = [f"{where}: label of task {task!r} is {column!r}" for task, column in labels.items()]
    choices += [f"{where}: times are {note}"]
    return RawImpressions(table=pa.table(out), negative_rate=config.negative_rate), choices


def clicked(impressions: RawImpressions, which: Literal["positive", "all"]) -> pa.Table:
    """The impressions that become events, as an events table.

    Args:
        impressions: The impressions.
        which: Those with a positive first label, or all.
    """
    table = impressions.table
    events = table.select([raw.USER, raw.ITEM, raw.TIMESTAMP])
    if which == "all":
        return events
    first = impressions.names(raw.LABEL_PREFIX)[0]
    return events.filter(pc.equal(table[raw.LABEL_PREFIX + first], 1.0))


def _usual_label(present: list[str], where: str) -> dict[str, str]:
    for name in ("click", "clicked", "is_click", "label"):
        if name in present:
            return {_TASK: name}
    raise ValueError(
        f"{where}: no label; the file has {', '.join(present)}; name a task and its column with {_FLAG}labels click "
        "COLUMN"
    )


def _complete(column: pa.Array, where: str) -> pa.Array:
    """The column, refused with nulls: an impression without user, item or time is of no use, and hides something."""
    if column.null_count:
        raise ValueError(
            f"{where} is null in {column.null_count:,} of {len(column):,} impressions; fill the column, or drop those "
            "rows"
        )
    return column


def _label(column: pa.ChunkedArray, where: str, at_least: float | None) -> pa.Array:
    numbers = values.number_column(column, where).to_numpy(zero_copy_only=False)
    if np.isnan(numbers).any():
        raise ValueError(f"{where}: {int(np.isnan(numbers).sum()):,} impressions have no label; fill it, or drop them")
    if at_least is not None:
        return pa.array((numbers >= at_least).astype(np.float64))
    wrong = numbers[(numbers != 0) & (numbers != 1)]
    if wrong.size:
        raise ValueError(
            f"{where}: label is {wrong[0]} in {wrong.size:,} of {numbers.size:,} impressions, must be 0 or 1; make it "
            f"one with {_FLAG}label-at-least TASK NUMBER (4 for ratings)"
        )
    return pa.array(numbers)


def _weight(column: pa.ChunkedArray, where: str) -> pa.Array:
    numbers = values.number_column(column, where)
    found = numbers.to_numpy(zero_copy_only=False)
    wrong = found[~(found >= 0) | ~np.isfinite(found)]
    if wrong.size:
        raise ValueError(f"{where}: weight is {wrong[0]} in {wrong.size:,} impressions; write numbers of at least 0")
    return numbers


def _history(table: pa.Table, config: ImpressionsConfig, roles: Roles, place: str) -> dict[str, pa.Array]:
    """The own history as lists of ids and, where given, of times."""
    assert config.history_item is not None
    items = _lists(table[config.history_item], f"{place}{config.history_item!r}")
    ids = _complete(
        values.id_column(items.values, f"{place}{config.history_item!r}"), f"{place}{config.history_item!r}"
    )
    out = {raw.HISTORY_ITEM: pa.LargeListArray.from_arrays(items.offsets, ids)}
    if config.history_time is None:
        return out
    at = f"{place}{config.history_time!r}"
    times = _lists(table[config.history_time], at)
    if not np.array_equal(times.offsets.to_numpy(), items.offsets.to_numpy()):
        raise ValueError(f"{at}: lists of other lengths than {config.history_item!r}; write one time per item")
    if len(times.values):
        read, _ = values.time_column(times.values, at, roles.unit, roles.timezone)
    else:
        read = pa.array([], pa.int64())
    out[raw.HISTORY_TIME] = pa.LargeListArray.from_arrays(times.offsets, _complete(read, at))
    return out


def _lists(column: pa.ChunkedArray, where: str) -> pa.LargeListArray:
    """The column as large lists whose values begin at 0; a null list is an empty one."""
    array = values.flat(column)
    if not values.is_list(array.type):
        raise ValueError(f"{where}: is {array.type}, must hold a list per impression (Parquet)")
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pc.list_flatten(array))
