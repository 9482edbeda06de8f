"""Which splits are made: leave-one-out always, by time wherever there are absolute times."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mufasa_rec.data.events import EventLog
from mufasa_rec.data.importers.values import time_column
from mufasa_rec.data.splits import DEFAULT_TARGETS_PER_ROW, Split, leave_one_out, time_borders, time_split

POLICIES = ("leave_one_out", "time")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which splits, and where their borders are.

    Attributes:
        policies: ``leave_one_out`` and ``time``; by default all that the data allows.
        validation_from: Validation border of the time split, ISO 8601; by default a quantile.
        test_from: Its test border, likewise.
        validation_share: Share of events between the borders, when they are quantiles.
        test_share: Share of events from the test border on, when it is a quantile.
        targets_per_row: Most targets a training row may have; longer histories become several rows.
    """

    policies: tuple[str, ...] | None = None
    validation_from: str | None = None
    test_from: str | None = None
    validation_share: float = 0.1
    test_share: float = 0.1
    targets_per_row: int = DEFAULT_TARGETS_PER_ROW

    def __post_init__(self) -> None:
        for policy in self.policies or ():
            if policy not in POLICIES:
                raise ValueError(f"split.policies: {policy!r} is not known; choose from {', '.join(POLICIES)}")
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("split.validation_from and split.test_from go together; give both or none")


def make_splits(config: SplitConfig, log: EventLog, timezone: str | None = None) -> tuple[list[Split], dict[str, str]]:
    """The splits that were asked for or, by default, that the data allows.

    Args:
        config: What was asked for.
        log: The events.
        timezone: Zone of borders that are written without one.

    Returns:
        The splits, and for each that was not made the reason.

    Raises:
        ValueError: A time split was asked for by name and the data has no absolute times.
    """
    wanted = config.policies or POLICIES
    splits, not_made = [], {}
    if "leave_one_out" in wanted:
        splits.append(leave_one_out(log.lengths, config.targets_per_row))
    if "time" in wanted:
        by_name = config.policies is not None or config.test_from is not None
        if log.timestamp is None and by_name:
            raise ValueError(
                "split.policies: 'time' needs absolute times and the data has none; name a time column with "
                "--columns.time, or ask for leave_one_out only"
            )
        if log.timestamp is None:
            not_made["time"] = "the data has no absolute times"
        else:
            _add_time_split(config, log, timezone, by_name, splits, not_made)
    return [_with_train_end(split, log) for split in splits], not_made


def _with_train_end(split: Split, log: EventLog) -> Split:
    """The split with the time of its last training event among its borders, where there are times.

    Items released later were not there to be chosen in training, so they must not serve as negatives.
    """
    rows = split.parts["train"]
    if log.timestamp is None or not rows.user.size:
        return split
    last = log.timestamp[log.offsets[rows.user] + rows.history_end - 1]
    return replace(split, borders={**split.borders, "train_end": int(last.max())})


def _add_time_split(
    config: SplitConfig,
    log: EventLog,
    timezone: str | None,
    by_name: bool,
    splits: list[Split],
    not_made: dict[str, str],
) -> None:
    assert log.timestamp is not None
    borders = borders_in_time(config, log.timestamp, timezone)
    try:
        splits.append(time_split(log.offsets, log.timestamp, borders, config.targets_per_row))
    except ValueError as error:
        if by_name:
            raise
        not_made["time"] = str(error)


def borders_in_time(config: SplitConfig, times: np.ndarray, timezone: str | None) -> tuple[int, int]:
    """Validation and test border in milliseconds UTC: as asked for, or quantiles of `times [n]`."""
    if config.validation_from is not None and config.test_from is not None:
        return _border(config.validation_from, timezone), _border(config.test_from, timezone)
    return time_borders(times, config.validation_share, config.test_share)


def _border(text: str, timezone: str | None) -> int:
    times, _ = time_column(pa.array([text]), "border of the time split", "iso", timezone)
    return int(times[0].as_py())
