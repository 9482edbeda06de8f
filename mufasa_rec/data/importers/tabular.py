"""Any tabular source: CSV or Parquet events, items and vector files in one folder, in a user's own column names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from mufasa_rec.data import paths, raw
from mufasa_rec.data.importers import values
from mufasa_rec.data.importers.columns import (
    ColumnsConfig,
    Resolution,
    require_columns,
    resolve_events,
    resolve_impressions,
    resolve_items,
)
from mufasa_rec.data.importers.files import SourceFiles, find_files, fingerprint, read_table, table_schema
from mufasa_rec.data.importers.impressions import Roles, clicked, read_impressions
from mufasa_rec.data.raw import RawData, RawImpressions

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions
EVENTS_NAMES = ("interactions", "events", "ratings")
ITEMS_NAMES = ("items", "movies", "products")


def read_tabular(
    source: str, columns: ColumnsConfig, *, items: str | None = None, vectors: dict[str, str] | None = None
) -> RawData:
    """Reads a folder (``interactions.*``, ``items.*``, one vector file per modality) or a single events file.

    Args:
        source: Folder, file or URL.
        columns: Column names and how to read them.
        items: The items file, when it is not in the folder.
        vectors: More vector files by modality.

    Raises:
        ValueError: Something is missing or cannot be read; names file, column and remedy.
    """
    if source.endswith((".parquet", ".csv", ".tsv")) and not paths.list_files(source):
        files = SourceFiles(events=[source])
    else:
        files = find_files(source, EVENTS_NAMES, ITEMS_NAMES)
    if items is not None:
        files.items = items
    files.vectors |= vectors or {}
    return read_files(PurePosixPath(source).name.split(".")[0], files, columns)


def read_files(name: str, files: SourceFiles, columns: ColumnsConfig) -> RawData:
    """Reads a source whose files are known."""
    shown, choices = _read_impressions(files, columns)
    ignored, dropped = dict(files.ignored), {}
    if shown is not None and (not files.events or columns.impressions.source == "events"):
        shown = dataclasses.replace(shown, are_events=True)
        events = clicked(shown, columns.impressions.history)
    else:
        events, found, how = _read_events(files.events, columns)
        choices, ignored = [*found.choices, *how, *choices], {**ignored, **_with_file(found)}
    items = read_items(files.items, columns) if files.items else None
    if items is not None:
        choices += items.found.choices
        ignored |= _with_file(items.found)
        if shown is not None:
            shown = dataclasses.replace(shown, table=_without(shown.table, items.gone))
        left = _without(events, items.gone)
        if left.num_rows < events.num_rows:
            filters = ", ".join(f"{column} = {pattern}" for column, pattern in columns.drop_items.items())
            dropped[f"events of items dropped by the filter {filters}"] = events.num_rows - left.num_rows
        events = left
    return RawData(
        name=name,
        events=events,
        items=items.table if items else None,
        vectors=dict(files.vectors),
        absolute_times=raw.TIMESTAMP in events.column_names,
        timezone=columns.timezone,
        choices=[
            *choices,
            *(f"{PurePosixPath(url).name}: vectors of modality {key!r}" for key, url in files.vectors.items()),
        ],
        ignored=ignored,
        dropped=dropped,
        fingerprint=fingerprint(files.all_files()),
        impressions=shown,
    )


def _read_impressions(files: SourceFiles, columns: ColumnsConfig) -> tuple[RawImpressions | None, list[str]]:
    """The impressions where the source has any, and what was chosen."""
    config = columns.impressions
    urls = {"auto": files.impressions, "events": files.events, "none": []}[config.source]
    if not urls:
        if not files.events:
            raise ValueError(
                "--columns.impressions.source: 'none' or 'events', but there is no events file; use 'auto'"
            )
        return None, []
    where = PurePosixPath(urls[0]).name
    found = resolve_impressions(columns, table_schema(urls[0]).names, where)
    roles = Roles(
        user=found.columns["user"],
        item=found.columns["item"],
        time=found.columns.get("time"),
        unit=columns.time_unit,
        timezone=columns.timezone,
    )
    shown, how = read_impressions(urls, config, roles, where)
    return shown, [*found.choices, *how]


def _with_file(found: Resolution) -> dict[str, str]:
    return {f"{found.where}: {column}": reason for column, reason in found.ignored.items()}


def _read_events(urls: list[str], config: ColumnsConfig) -> tuple[pa.Table, Resolution, list[str]]:
    """The events in canonical columns, what was chosen, and how times were read."""
    where = PurePosixPath(urls[0]).name
    found = resolve_events(config, table_schema(urls[0]).names, where)
    wanted = [*found.columns.values(), *found.categoricals]
    tables = [read_table(url, wanted) for url in urls]
    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    out: dict[str, pa.Array] = {}
    how: list[str] = []
    for role, column in found.columns.items():
        place = f"{where}: column {column!r}"
        if role in ("user", "item"):
            out[role] = values.id_column(table[column], place)
        elif role == "time":
            out[raw.TIMESTAMP], note = values.time_column(table[column], place, config.time_unit, config.timezone)
            how.append(f"{where}: times are {note}")
        elif role == "position":
            out[raw.POSITION] = values.position_column(table[column], place)
        elif role == "label":
            out[raw.LABEL] = _label(table[column], place, config.label_at_least)
        elif role == "weight":
            out[raw.WEIGHT] = values.number_column(table[column], place)
        else:
            out[role] = values.categorical_column(table[column], place)
    for column in found.categoricals:
        out[_free_name(column, raw.EVENT_COLUMNS, where)] = values.categorical_column(
            table[column], f"{where}: {column}"
        )
    return pa.table(out), found, how


def _label(column: pa.ChunkedArray, where: str, at_least: float | None) -> pa.Array:
    numbers = values.number_column(column, where)
    if at_least is None:
        return numbers
    return pc.greater_equal(numbers, at_least).cast(pa.int8()).cast(pa.float64())


def _free_name(column: str, taken: tuple[str, ...], where: str) -> str:
    if column in taken:
        raise ValueError(
            f"{where}: a categorical may not be called {column!r}, that name has a meaning; rename the column"
        )
    return column


@dataclass
class Items:
    """The items file: what is kept, in canonical columns; what was chosen; ids that a filter dropped."""

    table: pa.Table
    found: Resolution
    gone: pa.Array


def read_items(url: str, config: ColumnsConfig) -> Items:
    """Reads the items file and applies the filters of ``config.drop_items``."""
    where = PurePosixPath(url).name
    schema = table_schema(url)
    found = resolve_items(config, schema.names, [f.name for f in schema if values.is_list(f.type)], where)
    require_columns(where, schema.names, list(config.drop_items), "drop_items")
    table = read_table(url, [*found.columns.values(), *found.categoricals, *config.drop_items])
    out: dict[str, pa.Array] = {raw.ITEM_ID: values.id_column(table[found.columns["item_id"]], f"{where}: item id")}
    if "title" in found.columns:
        out[raw.TITLE] = values.flat(table[found.columns["title"]]).cast(pa.large_string())
    for role in (raw.AVAILABLE_FROM, raw.AVAILABLE_TO):
        if role in found.columns:
            column = found.columns[role]
            out[role], _ = values.time_column(table[column], f"{where}: {column}", config.time_unit, config.timezone)
    for column in found.categoricals:
        place = f"{where}: column {column!r}"
        name = _free_name(column, raw.ITEM_COLUMNS, where)
        out[name] = values.categorical_column(table[column], place, config.list_separator)
    drop = _matches(table, config.drop_items, found)
    found.ignored = {name: reason for name, reason in found.ignored.items() if name not in config.drop_items}
    items = pa.table(out)
    return Items(items.filter(pc.invert(drop)), found, values.flat(items.filter(drop)[raw.ITEM_ID]))


def _matches(table: pa.Table, filters: dict[str, str], found: Resolution) -> pa.Array:
    """Which items a filter drops."""
    drop = pa.array(np.zeros(table.num_rows, bool))
    for column, pattern in filters.items():
        try:
            text = values.flat(table[column]).cast(pa.large_string())
            match = pc.fill_null(pc.match_substring_regex(text, f"^(?:{pattern})$"), False)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"drop_items: {pattern!r} for column {column!r} is no regular expression ({error}); correct it"
            ) from error
        found.choices.append(f"{found.where}: {pc.sum(match).as_py()} items dropped by {column} = {pattern}")
        drop = pc.or_(drop, match)
    return drop


def _without(events: pa.Table, gone: pa.Array) -> pa.Table:
    """Events whose item is not among ``gone``."""
    if not len(gone):
        return events
    item = values.flat(events[raw.ITEM])
    if item.type != gone.type:
        item, gone = item.cast(pa.large_string()), gone.cast(pa.large_string())
    return events.filter(pc.invert(pc.is_in(item, value_set=gone)))
