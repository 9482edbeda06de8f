"""Writes requests as Parquet: by reference to the events of their user, or with their own lists of events."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mufasa_rec.data import raw
from mufasa_rec.data.event_files import GROUPS_PER_READER, PARTITION, READERS, Bucket, bucket_file, file_hash
from mufasa_rec.data.events import EventLog
from mufasa_rec.data.requests import Requests

REQUEST_TIME, REQUEST = "request_time", "request"
SCALARS = {raw.USER: pa.int64(), "history_end": pa.int32(), REQUEST_TIME: pa.int64(), REQUEST: pa.int64()}


@dataclass(frozen=True)
class Histories:
    """What each request may know.

    Attributes:
        end: Events of each request's history, `[R]` int64.
        log: With own histories the lists, one "user" per request; None where the events are stored once per user.
    """

    end: np.ndarray
    log: EventLog | None = None


def request_groups(requests: Requests, users: np.ndarray, plan: list[Bucket]) -> list[list[np.ndarray]]:
    """Requests of each row group of each bucket: those of the group's users.

    Args:
        requests: All requests.
        users: Users of the event log, `[U]` ascending.
        plan: Buckets and row groups of the events.
    """
    first = np.searchsorted(requests.user, users)
    last = np.searchsorted(requests.user, users, side="right")
    groups = []
    for bucket in plan:
        found = []
        for start, stop in zip(bucket.bounds[:-1], bucket.bounds[1:], strict=True):
            members = bucket.users[start:stop]
            found.append(np.concatenate([np.arange(first[u], last[u]) for u in members.tolist()] or [_NONE]))
        groups.append(found)
    return groups


def even_groups(number: int) -> list[list[np.ndarray]]:
    """One bucket of row groups of about equal size, at least four per virtual reader where there are as many rows."""
    return [list(np.array_split(np.arange(number), max(1, min(READERS * GROUPS_PER_READER, number))))]


def write_requests(
    folder: Path,
    split: str,
    part: str,
    chosen: np.ndarray,
    requests: Requests,
    histories: Histories,
    groups: list[list[np.ndarray]],
) -> dict[str, str]:
    """Writes the requests of one part of a split.

    Args:
        folder: The data set.
        split: Name of the split.
        part: Name of the part.
        chosen: Which requests are in it, `[R]` bool.
        requests: All requests.
        histories: What each may know.
        groups: Requests of each row group of each file.

    Returns:
        sha256 of each file, by path relative to the split's folder.
    """
    place = folder / "splits" / split
    files = {}
    for number, bucket in enumerate(groups):
        path = place / part / PARTITION / bucket_file(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = [_table(index[chosen[index]], requests, histories) for index in bucket]
        with pq.ParquetWriter(path, tables[0].schema, compression="snappy", write_statistics=[raw.USER]) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=max(1, table.num_rows))
        files[path.relative_to(place).as_posix()] = file_hash(path)
    return files


def _table(index: np.ndarray, requests: Requests, histories: Histories) -> pa.Table:
    scalars = (requests.user, histories.end, requests.time, requests.request)
    columns = {
        name: pa.array(values[index], kind) for (name, kind), values in zip(SCALARS.items(), scalars, strict=True)
    }
    if histories.log is not None:
        log = histories.log
        lists = {raw.ITEM: log.item} | ({} if log.timestamp is None else {raw.TIMESTAMP: log.timestamp})
        del columns["history_end"]
        columns |= _sliced(index, log.offsets, lists)
    return pa.table(columns | _sliced(index, requests.offsets, requests.columns))


def _sliced(index: np.ndarray, offsets: np.ndarray, columns: dict[str, np.ndarray]) -> dict[str, pa.Array]:
    """Some rows of list columns."""
    lengths = np.diff(offsets)[index]
    ends = np.r_[0, np.cumsum(lengths)]
    place = np.arange(int(ends[-1])) + np.repeat(offsets[:-1][index] - ends[:-1], lengths)
    return {
        name: pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values[place]))
        for name, values in columns.items()
    }


_NONE = np.zeros(0, np.int64)
