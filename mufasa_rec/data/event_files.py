"""Writes the event log and the rows of splits as Parquet, row groups aligned: a reader slices and never searches.

Row group g of a rows file references only users of row group g of the events file of the same partition and bucket.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mufasa_rec.data import raw
from mufasa_rec.data.events import EventLog
from mufasa_rec.data.splits import Rows

PARTITION = "base"
READERS = 64  # virtual readers of the loader
GROUPS_PER_READER = 4
MAX_GROUP_EVENTS = 262_144
ROWS_SCHEMA = pa.schema([("user", pa.int64()), ("history_end", pa.int32()), ("target_from", pa.int32())])
_BIG_EVENTS = 5_000_000


def bucket_file(bucket: int) -> str:
    """File name of a bucket."""
    return f"bucket-{bucket:05d}.parquet"


def default_buckets(events: int) -> int:
    """One bucket for small logs, then about five million events each."""
    return max(1, -(-events // _BIG_EVENTS)) if events > _BIG_EVENTS else 1


def bucket_of(users: np.ndarray, buckets: int) -> np.ndarray:
    """Bucket of each user: a mixed 64-bit value (SplitMix64's finaliser) modulo the number of buckets.

    Args:
        users: User ids, int64 `[n]`.
        buckets: Number of buckets.

    Returns:
        int64 `[n]`.
    """
    with np.errstate(over="ignore"):
        x = users.astype(np.int64).view(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x % np.uint64(buckets)).astype(np.int64)


@dataclass(frozen=True)
class Bucket:
    """Users of one file and where its row groups begin.

    Attributes:
        users: Indices into the event log, ascending, int64 `[k]`.
        bounds: int64 `[groups + 1]`: group g holds ``users[bounds[g]:bounds[g + 1]]``.
    """

    users: np.ndarray
    bounds: np.ndarray


def plan_buckets(log: EventLog, buckets: int, targets_per_row: int, rows: np.ndarray | None = None) -> list[Bucket]:
    """Deals users to buckets and each bucket to row groups of about equal training work.

    There are at least four groups per virtual reader over all buckets where there are as many users, a group has at
    most 262,144 events (or one user), and no group is empty. Work is counted in training rows, because every batch
    takes the same number of rows from each reader.

    Args:
        log: The events.
        buckets: Number of buckets.
        targets_per_row: Most targets of a training row.
        rows: Rows of each user, `[U]`, where they are not made from targets.
    """
    number = bucket_of(log.users, buckets)
    plan = []
    for bucket in range(buckets):
        users = np.flatnonzero(number == bucket)
        events = log.lengths[users]
        groups = max(-(-READERS * GROUPS_PER_READER // buckets), -(-int(events.sum()) // MAX_GROUP_EVENTS))
        work = np.maximum(1, -(-events // targets_per_row) if rows is None else rows[users])
        plan.append(Bucket(users, _split_large(_equal_bounds(work, min(groups, users.size)), events)))
    return plan


def _equal_bounds(work: np.ndarray, groups: int) -> np.ndarray:
    """Bounds of ``groups`` non-empty runs of about equal work."""
    if not groups:
        return np.zeros(1, np.int64)
    total = np.cumsum(work)
    bounds = np.r_[0, np.searchsorted(total, np.arange(1, groups) * total[-1] / groups) + 1, work.size]
    step = np.arange(groups + 1)
    bounds = np.maximum.accumulate(bounds - step) + step  # strictly ascending
    bounds = np.minimum(bounds, work.size - groups + step)  # and room for the rest
    return bounds.astype(np.int64)


def _split_large(bounds: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Cuts groups of more than ``MAX_GROUP_EVENTS`` events at users."""
    total = np.r_[0, np.cumsum(events)]
    out = [0]
    for stop in bounds[1:].tolist():
        while total[stop] - total[out[-1]] > MAX_GROUP_EVENTS:
            cut = int(np.searchsorted(total, total[out[-1]] + MAX_GROUP_EVENTS, side="right")) - 1
            cut = max(cut, out[-1] + 1)
            if cut >= stop:
                break
            out.append(cut)
        out.append(stop)
    return np.asarray(out, np.int64)


def write_events(folder: Path, log: EventLog, plan: list[Bucket]) -> dict[str, str]:
    """Writes one row per user with list columns.

    Returns:
        sha256 of each file, by path relative to ``folder`` (the data set).
    """
    columns = {raw.ITEM: log.item} | ({} if log.timestamp is None else {raw.TIMESTAMP: log.timestamp}) | log.columns
    types = {name: pa.list_(pa.from_numpy_dtype(array.dtype)) for name, array in columns.items()}
    schema = pa.schema([(raw.USER, pa.int64()), *types.items()])
    files = {}
    for number, bucket in enumerate(plan):
        path = folder / "events" / PARTITION / bucket_file(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, schema, compression="snappy", write_statistics=[raw.USER]) as writer:
            for start, stop in zip(bucket.bounds[:-1], bucket.bounds[1:], strict=True):
                users = bucket.users[start:stop]
                writer.write_table(_event_group(log, columns, users, schema), row_group_size=max(1, users.size))
        files[path.relative_to(folder).as_posix()] = file_hash(path)
    return files


def _event_group(log: EventLog, columns: dict[str, np.ndarray], users: np.ndarray, schema: pa.Schema) -> pa.Table:
    lengths = log.lengths[users]
    offsets = np.r_[0, np.cumsum(lengths)]
    place = np.arange(offsets[-1]) + np.repeat(log.offsets[users] - offsets[:-1], lengths)
    lists = [
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(array[place])) for array in columns.values()
    ]
    return pa.Table.from_arrays([pa.array(log.users[users]), *lists], schema=schema)


def write_rows(folder: Path, split: str, part: str, rows: Rows, log: EventLog, plan: list[Bucket]) -> dict[str, str]:
    """Writes the rows of one part of a split.

    Returns:
        sha256 of each file, by path relative to the split's folder.
    """
    first = np.searchsorted(rows.user, np.arange(log.users.size + 1))  # rows are sorted by user
    files = {}
    for number, bucket in enumerate(plan):
        place = folder / "splits" / split
        path = place / part / PARTITION / bucket_file(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, ROWS_SCHEMA, compression="snappy", write_statistics=[raw.USER]) as writer:
            for start, stop in zip(bucket.bounds[:-1], bucket.bounds[1:], strict=True):
                users = bucket.users[start:stop]
                counts = first[users + 1] - first[users]
                index = np.repeat(first[users] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
                group = [log.users[rows.user[index]], rows.history_end[index], rows.target_from[index]]
                table = pa.Table.from_arrays([pa.array(column) for column in group], schema=ROWS_SCHEMA)
                writer.write_table(table, row_group_size=max(1, index.size))
        files[path.relative_to(place).as_posix()] = file_hash(path)
    return files


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
