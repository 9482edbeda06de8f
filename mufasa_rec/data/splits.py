"""Which events are trained on, validated on and tested on: rows ``(user, history_end, target_from)``.

A row's targets are the events ``[target_from, history_end)`` of its user, each predicted from the events before it.
Everything here is a function of numbers; the files are written by ``event_files``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mufasa_rec.data.schema import PartInfo

DEFAULT_TARGETS_PER_ROW = 200


@dataclass(frozen=True)
class Rows:
    """Rows of one part, sorted by user and history_end.

    Attributes:
        user: Index of the user in the event log, int64 `[R]`.
        history_end: int32 `[R]`.
        target_from: int32 `[R]`, at least 1 and less than history_end.
    """

    user: np.ndarray
    history_end: np.ndarray
    target_from: np.ndarray

    def info(self) -> PartInfo:
        """Numbers of rows and targets."""
        return PartInfo(rows=int(self.user.size), targets=int((self.history_end - self.target_from).sum()))


@dataclass(frozen=True)
class Split:
    """A split before it is written."""

    id: str
    parts: dict[str, Rows]
    borders: dict[str, int]


def training_rows(ends: np.ndarray, targets_per_row: int) -> Rows:
    """Rows whose targets are all events of ``[1, ends[u])``, cut from the newest end.

    Args:
        ends: Training events per user, int64 `[U]`; a user with fewer than 2 has no row.
        targets_per_row: Most targets a row may have.
    """
    if targets_per_row < 1:
        raise ValueError(f"targets_per_row: is {targets_per_row}; must be at least 1")
    targets = np.maximum(ends - 1, 0)
    pieces = -(-targets // targets_per_row)
    user = np.repeat(np.arange(ends.size), pieces)
    # Pieces of a user are numbered from the oldest: the newest is full, the oldest takes what is left.
    number = np.arange(user.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    history_end = ends[user] - (pieces[user] - 1 - number) * targets_per_row
    return _rows(user, history_end, np.maximum(1, history_end - targets_per_row))


def _rows(user: np.ndarray, history_end: np.ndarray, target_from: np.ndarray) -> Rows:
    return Rows(user.astype(np.int64), history_end.astype(np.int32), target_from.astype(np.int32))


def leave_one_out(lengths: np.ndarray, targets_per_row: int = DEFAULT_TARGETS_PER_ROW) -> Split:
    """The last event of each user is the test target, the one before it the validation target.

    Users with fewer than 3 events are for training only.

    Args:
        lengths: Events per user, int64 `[U]`.
        targets_per_row: Most targets a training row may have.

    Example:
        >>> split = leave_one_out(np.array([2, 4]))
        >>> split.parts["train"].history_end.tolist(), split.parts["test"].history_end.tolist()
        ([2, 2], [4])
    """
    held_out = lengths >= 3
    user, n = np.flatnonzero(held_out), lengths[held_out]
    parts = {
        "train": training_rows(np.where(held_out, lengths - 2, lengths), targets_per_row),
        "validation": _rows(user, n - 1, n - 2),
        "test": _rows(user, n, n - 1),
    }
    return Split("leave_one_out", parts, {})


def time_borders(timestamp: np.ndarray, validation_share: float, test_share: float) -> tuple[int, int]:
    """Borders at quantiles of the event times.

    Args:
        timestamp: int64 `[N]` milliseconds.
        validation_share: Share of events between the borders.
        test_share: Share of events from the test border on.

    Returns:
        Validation and test border, milliseconds UTC.
    """
    if min(validation_share, test_share) <= 0 or validation_share + test_share >= 1:
        raise ValueError(
            f"validation_share={validation_share}, test_share={test_share}: both must be above 0 and together below 1"
        )
    quantiles = [1 - validation_share - test_share, 1 - test_share]
    validation, test = np.quantile(timestamp, quantiles, method="higher")
    return int(validation), int(test)


def time_split(
    offsets: np.ndarray,
    timestamp: np.ndarray,
    borders: tuple[int, int],
    targets_per_row: int = DEFAULT_TARGETS_PER_ROW,
) -> Split:
    """Training ends at one time for everybody; a user with events on both sides is asked for the first one after it.

    Args:
        offsets: Event log's offsets, int64 `[U + 1]`.
        timestamp: int64 `[N]`, ascending within each user.
        borders: Validation border V and test border T, milliseconds, V < T.
        targets_per_row: Most targets a training row may have.

    Raises:
        ValueError: V is not before T, or no event lies before V or from T on.
    """
    validation, test = borders
    if validation >= test:
        raise ValueError(f"time split: the validation border {validation} must be before the test border {test}")
    before_v = _count_before(offsets, timestamp, validation)
    before_t = _count_before(offsets, timestamp, test)
    lengths = np.diff(offsets)
    if not before_v.any() or not (before_t < lengths).any():
        raise ValueError(
            f"time split: there must be events before the validation border {validation} and from "
            f"the test border {test} "
            f"on; the times go from {timestamp.min()} to {timestamp.max()}"
        )
    asked_v = np.flatnonzero((before_v > 0) & (before_v < before_t))
    asked_t = np.flatnonzero((before_t > 0) & (before_t < lengths))
    parts = {
        "train": training_rows(before_v, targets_per_row),
        "validation": _rows(asked_v, before_v[asked_v] + 1, before_v[asked_v]),
        "test": _rows(asked_t, before_t[asked_t] + 1, before_t[asked_t]),
    }
    return Split("time", parts, {"validation": validation, "test": test})


def _count_before(offsets: np.ndarray, timestamp: np.ndarray, border: int) -> np.ndarray:
    """Events of each user before ``border``, int64 `[U]`."""
    total = np.r_[0, np.cumsum(timestamp < border)]
    return total[offsets[1:]] - total[offsets[:-1]]


def training_ends(rows: Rows, num_users: int) -> np.ndarray:
    """Events of each user that its training rows cover, int64 `[num_users]`."""
    ends = np.zeros(num_users, np.int64)
    np.maximum.at(ends, rows.user, rows.history_end)
    return ends


def training_counts(rows: Rows, offsets: np.ndarray, item_rows: np.ndarray, num_items: int) -> np.ndarray:
    """Training events per item: inputs and targets of the training rows, each event once.

    Args:
        rows: Training rows.
        offsets: Event log's offsets, int64 `[U + 1]`.
        item_rows: Item row of each event, int64 `[N]`.
        num_items: Size of the catalog.

    Returns:
        Counts, int64 `[num_items]`.
    """
    ends = training_ends(rows, offsets.size - 1)
    position = np.arange(item_rows.size) - np.repeat(offsets[:-1], np.diff(offsets))
    inside = position < np.repeat(ends, np.diff(offsets))
    return np.bincount(item_rows[inside], minlength=num_items)
