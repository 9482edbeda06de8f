"""The check of a file of requests: columns, labels, references, and that no history reaches to its request."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mufasa_rec.data import paths, raw
from mufasa_rec.data.check_tables import EventFile
from mufasa_rec.data.importers.values import flat
from mufasa_rec.data.items import ItemStore
from mufasa_rec.data.request_files import SCALARS
from mufasa_rec.data.requests import CANDIDATE, IMPRESSION, WEIGHT
from mufasa_rec.data.schema import ImpressionsInfo

Say = Callable[[str], None]


def check_requests_file(
    url: str, events_url: str | None, events: EventFile | None, info: ImpressionsInfo, items: ItemStore | None, say: Say
) -> tuple[int, int]:
    """Checks a file of requests.

    Args:
        url: The file.
        events_url: The events file that it references; None with lists of its own.
        events: What that file holds.
        info: What `dataset.json` says of impressions.
        items: The item store.
        say: Takes each problem.

    Returns:
        Numbers of requests and impressions.
    """
    file = pq.ParquetFile(paths.local_copy(url))
    missing = sorted(_expected(info, events is None).items() - _types(file.schema_arrow).items())
    for name, kind in missing:
        say(f"column {name!r} must be {kind}; write it so, or correct dataset.json")
    if missing:
        return 0, 0
    if events is not None and file.num_row_groups != events.bounds.size - 1:
        say(f"has {file.num_row_groups} row groups, its events file has {events.bounds.size - 1}; prepare again")
        return 0, 0
    times = None if events_url is None else pq.ParquetFile(paths.local_copy(events_url))
    rows = shown = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        offsets = _check_candidates(table, info, items, say)
        if events is not None and times is not None:
            _check_histories(group, table, times.read_row_group(group, columns=[raw.USER, raw.TIMESTAMP]), say)
        rows, shown = rows + table.num_rows, shown + int(offsets)
    return rows, shown


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type).replace("element", "item") for field in schema}


def _expected(info: ImpressionsInfo, own_history: bool) -> dict[str, str]:
    """Type of each column that must be there."""
    found = {name: str(kind) for name, kind in SCALARS.items()}
    if own_history:
        del found["history_end"]
        found[raw.ITEM] = str(pa.list_(pa.int64()))
    lists = {CANDIDATE: pa.int64(), IMPRESSION: pa.int64()}
    lists |= {raw.LABEL_PREFIX + task: pa.float32() for task in info.tasks}
    lists |= {raw.CONTEXT_PREFIX + name: pa.int64() for name in info.context}
    lists |= {raw.DENSE_PREFIX + name: pa.float32() for name in info.dense}
    lists |= {WEIGHT: pa.float32()} if info.weighted else {}
    return found | {name: str(pa.list_(kind)) for name, kind in lists.items()}


def _check_candidates(table: pa.Table, info: ImpressionsInfo, items: ItemStore | None, say: Say) -> int:
    """Checks the lists of one row group; returns the number of its impressions."""
    columns = {
        name: flat(table[name]) for name in table.column_names if name not in (*SCALARS, raw.ITEM, raw.TIMESTAMP)
    }
    lengths = np.diff(columns[CANDIDATE].offsets.to_numpy())
    for name, column in columns.items():
        if not np.array_equal(np.diff(column.offsets.to_numpy()), lengths):
            say(f"column {name!r} has lists of other lengths than {CANDIDATE!r}; write one value per candidate")
    values = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in columns.items()}
    if items is not None:
        unknown = values[CANDIDATE][items.rows_of(values[CANDIDATE]) < 0]
        if unknown.size:
            say(f"{unknown.size:,} candidates are not in the item store (first: {unknown[0]}); add the items")
    for task in info.tasks:
        label = values[raw.LABEL_PREFIX + task]
        wrong = label[(label != 0) & (label != 1)]
        if wrong.size:
            say(f"label of {task!r} is {wrong[0]} in {wrong.size:,} impressions, must be 0 or 1; correct it")
    for name, size in info.context.items():
        codes = values[raw.CONTEXT_PREFIX + name]
        if codes.size and not 0 <= codes.min() <= codes.max() <= size:
            say(f"context {name!r} has codes outside 0..{size}; code it by its vocabulary")
    return int(lengths.sum())


def _check_histories(group: int, table: pa.Table, events: pa.Table, say: Say) -> None:
    """Whether every history ends strictly before its request, and exactly there."""
    user, end, time, _ = (flat(table[name]).to_numpy(zero_copy_only=False) for name in SCALARS)
    users = flat(events[raw.USER]).to_numpy(zero_copy_only=False)
    if not user.size:
        return
    place = np.minimum(np.searchsorted(users, user), max(users.size - 1, 0))
    if not users.size or (users[place] != user).any():
        say(f"row group {group}: requests of users that are not in row group {group} of the events; prepare again")
        return
    lists = flat(events[raw.TIMESTAMP])
    offsets = lists.offsets.to_numpy().astype(np.int64) - lists.offsets[0].as_py()
    times = np.r_[lists.flatten().to_numpy(zero_copy_only=False), 0]
    start, stop = offsets[place], offsets[place + 1]
    if (end > stop - start).any() or (end < 0).any():
        say(f"row group {group}: a history_end is beyond its user's events; prepare again")
        return
    late = int(((end > 0) & (times[np.maximum(start + end - 1, 0)] >= time)).sum())
    if late:
        say(f"row group {group}: {late:,} histories hold an event at or after their request; cut them strictly before")
