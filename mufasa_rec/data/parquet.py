"""Row groups of a split, as they lie in Arrow memory: the events of some users and the rows that reference them.

A row says (user, history_end, target_from): its events are those before `history_end`, its targets those of them at or
after `target_from`. A row group of rows refers to the users of the row group of events with the same number, so one
reader needs one pair of row groups at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
class ShownGroup:
    """What the rows of a row group showed, where rows are requests; candidates lie end to end in `columns`.

    Attributes:
        time: Time of each request, `[n]` milliseconds.
        request: The source's number of each request, `[n]`.
        start: Where the candidates of each request begin in `columns`, `[n]`.
        length: Candidates of each request, `[n]`.
        columns: Values of the candidates' columns, each `[candidates of the group]`.
    """

    time: np.ndarray
    request: np.ndarray
    start: np.ndarray
    length: np.ndarray
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class RowGroup:
    """A decoded row group. `n` rows; the lists of all its users lie end to end in `columns`.

    Attributes:
        user: User of each row, `[n]` int64.
        stream_start: Where the stream of each row's user begins in `columns`, `[n]`.
        stream_length: Events of that stream, `[n]`.
        history_end: One behind the last event of each row, counted from the stream's start, `[n]`.
        target_from: First target of each row, `[n]`.
        row_id: Number of each row in the whole part, `[n]`; random draws are keyed by it.
        columns: Values of the list columns, each `[events of the group]`.
        shown: What the rows showed, where they are requests.
    """

    user: np.ndarray
    stream_start: np.ndarray
    stream_length: np.ndarray
    history_end: np.ndarray
    target_from: np.ndarray
    row_id: np.ndarray
    columns: dict[str, np.ndarray]
    shown: ShownGroup | None = None


def list_row_groups(
    dataset: paths.Location, manifest: DatasetManifest, split: SplitRef, part: str
) -> list[RowGroupRef]:
    """All row groups of a part of a split, in a fixed order.

    Raises:
        ValueError: When the part has no files.
    """
    found = list(_row_groups(dataset, manifest, split, part))
    if not found:
        raise _no_rows(manifest, split, part)
    return found


def first_row_group(dataset: paths.Location, manifest: DatasetManifest, split: SplitRef, part: str) -> RowGroupRef:
    """The first of `list_row_groups`, without a look at other files.

    Raises:
        ValueError: When the part has no files.
    """
    found = next(_row_groups(dataset, manifest, split, part), None)
    if found is None:
        raise _no_rows(manifest, split, part)
    return found


def _row_groups(
    dataset: paths.Location, manifest: DatasetManifest, split: SplitRef, part: str
) -> Iterator[RowGroupRef]:
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
                    yield RowGroupRef(file, events, index, size, first_row)
                first_row += size


def _no_rows(manifest: DatasetManifest, split: SplitRef, part: str) -> ValueError:
    return ValueError(
        f"splits/{split.id}/{part}: no rows in data set {manifest.name!r}; too few users have enough events for "
        "this part, or the data set is not complete: prepare it again."
    )


class RowGroupReader:
    """Reads row groups; files read of late stay open, since parsing a footer costs more than reading a row group.

    Args:
        columns: Names of the list columns to read.
        shown: Names of the candidates' columns, where rows are requests; none where they are not.
        max_open: Most files held open.
    """

    def __init__(self, columns: Sequence[str], *, shown: Sequence[str] = (), max_open: int = 256) -> None:
        self.columns, self.shown, self.max_open = tuple(columns), tuple(shown), max_open
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    def read(self, ref: RowGroupRef) -> RowGroup:
        """Read one row group and the events that its rows reference.

        Raises:
            ValueError: For a missing column, a row that refers to a user or event that is not there, lists of different
                lengths, or a weight that is negative or not finite; names the file.
        """
        group = self._lists(ref) if ref.events is None else self._references(ref, ref.events)
        if self.shown:
            group = replace(group, shown=self._shown(ref))
        _check_range(group, ref)
        _check_weights(group, ref)
        return group

    def _references(self, ref: RowGroupRef, events_file: str) -> RowGroup:
        """Rows that refer to events stored once per user."""
        # The events of a request's history are no targets.
        last = "history_end" if self.shown else "target_from"
        rows = self._table(ref.rows, ref.index, list(dict.fromkeys(["user", "history_end", last])))
        events = self._table(events_file, ref.index, ["user", *self.columns])
        users, user = _numbers(events, "user", events_file), _numbers(rows, "user", ref.rows)
        place = np.searchsorted(users, user)
        known = place < len(users)
        known[known] = users[place[known]] == user[known]
        if not known.all():
            raise ValueError(
                f"{ref.rows}: row group {ref.index} refers to users that row group {ref.index} of {events_file} "
                "does not hold in ascending order; the two files must be written together: prepare the data set again."
            )
        starts, lengths, values = _lists(events, self.columns, events_file)
        end, target_from = (_numbers(rows, name, ref.rows) for name in ("history_end", last))
        row_id = ref.first_row + np.arange(ref.num_rows)
        return RowGroup(user, starts[place], lengths[place], end, target_from, row_id, values)

    def _lists(self, ref: RowGroupRef) -> RowGroup:
        """Rows that carry their own lists: each is its own stream."""
        extra = ["target_from"] if "target_from" in self._open(ref.rows).schema_arrow.names else []
        table = self._table(ref.rows, ref.index, ["user", *self.columns, *extra])
        starts, lengths, values = _lists(table, self.columns, ref.rows)
        # A row without events has no targets either.
        target_from = _numbers(table, "target_from", ref.rows) if extra else np.minimum(lengths, 1)
        row_id = ref.first_row + np.arange(ref.num_rows)
        return RowGroup(_numbers(table, "user", ref.rows), starts, lengths, lengths, target_from, row_id, values)

    def _shown(self, ref: RowGroupRef) -> ShownGroup:
        """The candidates of requests."""
        table = self._table(ref.rows, ref.index, ["request_time", "request", *self.shown])
        start, length, values = _lists(table, self.shown, ref.rows)
        time, request = (_numbers(table, name, ref.rows) for name in ("request_time", "request"))
        return ShownGroup(time, request, start, length, values)

    def _table(self, file: str, index: int, columns: Sequence[str]) -> pa.Table:
        parquet = self._open(file)
        names = parquet.schema_arrow.names
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(
                f"{file}: column {missing[0]!r} is missing; it has {names}. Write the column, or take it out of "
                "dataset.json."
            )
        return parquet.read_row_group(index, columns=list(columns), use_threads=False)

    def _open(self, file: str) -> pq.ParquetFile:
        """The open file, local ones through Arrow's own reader, which does not come back to Python for each read."""
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        while len(self._files) >= self.max_open:
            self._files.popitem(last=False)[1].close(force=True)
        with paths.open_file(file) as handle:  # a missing file is named here
            footer = pq.read_metadata(handle)
        source = paths.open_file(file) if paths.is_remote(file) else str(paths.local_path(file))
        self._files[file] = pq.ParquetFile(source, metadata=footer)
        return self._files[file]


def _numbers(table: pa.Table, name: str, file: str) -> np.ndarray:
    """A column of integers, `[n]` int64."""
    column = table.column(name)
    if column.null_count or not pa.types.is_integer(column.type):
        raise ValueError(
            f"{file}: column {name!r} is {column.type} with {column.null_count} nulls; write int64 without."
        )
    return column.to_numpy().astype(np.int64, copy=False)


def _lists(table: pa.Table, columns: Sequence[str], file: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Starts, lengths and values of list columns as they lie in Arrow memory; all columns share one set of offsets."""
    starts = lengths = None
    values: dict[str, np.ndarray] = {}
    for name in columns:
        column = table.column(name).combine_chunks()
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise ValueError(f"{file}: column {name!r} is {column.type}; write a list per row.")
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


def _check_range(group: RowGroup, ref: RowGroupRef) -> None:
    end, target_from, lengths = group.history_end, group.target_from, group.stream_length
    wrong = (end > lengths) | (target_from < 0) | (target_from > end)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{ref.rows}: row {row} of row group {ref.index} has target_from={target_from[row]}, "
            f"history_end={end[row]} for a stream of {lengths[row]} events; 0 <= target_from <= history_end <= events "
            "must hold: prepare the data set again."
        )


def _check_weights(group: RowGroup, ref: RowGroupRef) -> None:
    weight = group.columns.get("weight")
    if weight is None or not len(weight) or (np.isfinite(weight).all() and weight.min() >= 0):
        return
    bad = weight[~(np.isfinite(weight) & (weight >= 0))]
    raise ValueError(
        f"{ref.events or ref.rows}: column 'weight' of row group {ref.index} holds {len(bad)} weights "
        f"that are negative or not finite, such as {bad[0]}; a weight multiplies the loss: write 0 or more."
    )
