"""Row groups of a split, as they lie in Arrow memory: the events of some users and the rows that reference them.

A row says (user, history_end, target_from): its events are those before `history_end`, its targets those of them at or
after `target_from`. A row group of rows refers to the users of the row group of events with the same number, so one reader needs
one pair of row groups at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mufasa_rec.data import paths
from mufasa_rec.data.schema import DatasetManifest, SplitRef


@dataclass(frozen=True)
class RowGroupRef:
    """Where a row group lies.

    Attributes:
        rows: File of the rows.
        events: File of the events they reference; None when rows carry their own lists.
        index: Number of the row group in both files.
        num_rows: Rows of the group.
        first_row: Number of its first row in the whole part.
    """

    rows: str
    events: str | None
    index: int
    num_rows: int
    first_row: int


@dataclass(frozen=True)
class RowGroup:
    """A decoded row group. `n` rows; the lists of all its users lie end to end in `columns`.

    Attributes:
        user: User of each row, `[n]` int64.
        stream_start: Where the stream of each row's user begins in `columns`, `[n]`.
        history_end: One behind the last event of each row, counted from the stream's start, `[n]`.
        target_from: First target of each row, `[n]`.
        row_id: Number of each row in the whole part, `[n]`; random draws are keyed by it.
        columns: Values of the list columns, each `[events of the group]`.
    """

    user: np.ndarray
    stream_start: np.ndarray
    history_end: np.ndarray
    target_from: np.ndarray
    row_id: np.ndarray
    columns: dict[str, np.ndarray]


def list_row_groups(
    dataset: paths.Location, manifest: DatasetManifest, split: SplitRef, part: str
) -> list[RowGroupRef]:
    """All row groups of a part of a split, in a fixed order.

    Raises:
        ValueError: When the part has no files.
    """
    found: list[RowGroupRef] = []
    first_row = 0
    for partition in manifest.partitions:
        folder = paths.join(dataset, "splits", split.id, part, partition.name)
        for file in paths.list_files(folder, ".parquet"):
            events = None
            if split.layout == "references":
                events = paths.join(dataset, "events", partition.name, file.rsplit("/", 1)[-1])
            with paths.open_file(file) as handle:
                metadata = pq.read_metadata(handle)
            for index in range(metadata.num_row_groups):
                size = metadata.row_group(index).num_rows
                if size:
                    found.append(RowGroupRef(file, events, index, size, first_row))
                first_row += size
    if not found:
        raise ValueError(
            f"splits/{split.id}/{part}: no rows in data set {manifest.name!r}; too few users have enough events for this "
            "part, or the data set is not complete: prepare it again."
        )
    return found


def read_row_group(ref: RowGroupRef, columns: Sequence[str]) -> RowGroup:
    """Read one row group and the events that its rows reference.

    Args:
        ref: Where it lies.
        columns: Names of the list columns to read.

    Raises:
        ValueError: For a missing column, a row that refers to a user or event that is not there, or lists of different
            lengths; names the file.
    """
    if ref.events is None:
        return _read_lists(ref, columns)
    rows = _read(ref.rows, ref.index, ["user", "history_end", "target_from"])
    events = _read(ref.events, ref.index, ["user", *columns])
    users = events.column("user").to_numpy()
    user = rows.column("user").to_numpy()
    place = np.minimum(np.searchsorted(users, user), len(users) - 1)
    if not np.array_equal(users[place], user):
        raise ValueError(
            f"{ref.rows}: row group {ref.index} refers to users that row group {ref.index} of {ref.events} does not "
            "hold; the two files must be written together: prepare the data set again."
        )
    starts, lengths, values = _lists(events, columns, ref.events)
    end = rows.column("history_end").to_numpy().astype(np.int64)
    target_from = rows.column("target_from").to_numpy().astype(np.int64)
    _check_range(end, target_from, lengths[place], ref.rows)
    row_id = ref.first_row + np.arange(ref.num_rows)
    return RowGroup(user, starts[place], end, target_from, row_id, values)


def _read_lists(ref: RowGroupRef, columns: Sequence[str]) -> RowGroup:
    """Rows that carry their own lists: each is its own stream."""
    with paths.open_file(ref.rows) as handle:
        names = pq.read_schema(handle).names
    extra = [name for name in ("target_from",) if name in names]
    table = _read(ref.rows, ref.index, ["user", *columns, *extra])
    starts, lengths, values = _lists(table, columns, ref.rows)
    target_from = np.ones(len(lengths), dtype=np.int64)
    if extra:
        target_from = table.column("target_from").to_numpy().astype(np.int64)
    _check_range(lengths, target_from, lengths, ref.rows)
    row_id = ref.first_row + np.arange(ref.num_rows)
    return RowGroup(table.column("user").to_numpy(), starts, lengths, target_from, row_id, values)


def _read(file: str, index: int, columns: Sequence[str]) -> pa.Table:
    with paths.open_file(file) as handle:
        parquet = pq.ParquetFile(handle)
        missing = [name for name in columns if name not in parquet.schema_arrow.names]
        if missing:
            raise ValueError(
                f"{file}: column {missing[0]!r} is missing; it has {parquet.schema_arrow.names}. Write the column, or take "
                "it out of dataset.json."
            )
        return parquet.read_row_group(index, columns=list(columns), use_threads=False)


def _lists(table: pa.Table, columns: Sequence[str], file: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Starts, lengths and values of list columns as they lie in Arrow memory; all columns share one set of offsets."""
    starts = lengths = None
    values: dict[str, np.ndarray] = {}
    for name in columns:
        column = table.column(name).combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        base, size = int(offsets[0]), np.diff(offsets)
        if lengths is not None and not np.array_equal(size, lengths):
            raise ValueError(
                f"{file}: column {name!r} has lists of other lengths than {columns[0]!r}; write them aligned."
            )
        starts, lengths = offsets[:-1] - base, size
        inner = column.values.slice(base, int(offsets[-1]) - base)
        if inner.null_count:
            raise ValueError(f"{file}: column {name!r} holds {inner.null_count} nulls; drop those events or fill them.")
        values[name] = inner.to_numpy(zero_copy_only=False)
    assert starts is not None and lengths is not None
    return starts, lengths, values


def _check_range(end: np.ndarray, target_from: np.ndarray, lengths: np.ndarray, file: str) -> None:
    wrong = (end > lengths) | (target_from < 0) | (target_from > end)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{file}: row {row} has target_from={target_from[row]}, history_end={end[row]} for a stream of "
            f"{lengths[row]} events; 0 <= target_from <= history_end <= events must hold."
        )
