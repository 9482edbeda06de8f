"""Event logs for requests: users without events, and histories that impressions bring themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from mufasa_rec.data.events import EventLog
from mufasa_rec.data.requests import Requests


def with_users(log: EventLog, users: np.ndarray) -> EventLog:
    """The log with more users, who have no events.

    Args:
        log: The log.
        users: Ids of users, int64 `[n]`, those of the log or others.
    """
    every = np.union1d(log.users, users)
    lengths = np.zeros(every.size, np.int64)
    lengths[np.searchsorted(every, log.users)] = log.lengths
    return dataclasses.replace(log, users=every, offsets=np.r_[0, np.cumsum(lengths)])


def own_log(requests: Requests, offsets: pa.Array, items: np.ndarray, times: pa.Array | None) -> tuple[EventLog, int]:
    """Histories of the impressions themselves as a log of one "user" per request.

    Args:
        requests: The requests; the impressions of one share the history of the first.
        offsets: Where the history of each impression of the source begins in `items`, `[C + 1]`.
        items: Item ids of all histories, int64.
        times: Their times in milliseconds; None where they have none, then they are taken as they are.

    Returns:
        The log, without events that are not strictly before their request, and how many those were.
    """
    ends = offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    first = requests.order[requests.offsets[:-1]]
    lengths = ends[first + 1] - ends[first]
    owner = np.repeat(np.arange(lengths.size), lengths)
    place = np.arange(owner.size) + np.repeat(ends[first] - np.cumsum(lengths) + lengths, lengths)
    item, time, keep = items[place], None, np.ones(owner.size, bool)
    if times is not None:
        time = times.to_numpy(zero_copy_only=False)[place]
        order = np.lexsort((time, owner))  # stable, and the owners are in order already
        item, time = item[order], time[order]
        keep = time < requests.time[owner]
    sizes = np.bincount(owner[keep], minlength=lengths.size)
    log = EventLog(
        users=requests.user,
        offsets=np.r_[0, np.cumsum(sizes)],
        item=item[keep],
        timestamp=None if time is None else time[keep],
    )
    return log, int((~keep).sum())
