"""A cold split: the training events of some items are taken out, so that what is left of these items is unseen.

Leave-one-out asks each user for the last event, and the one before it. Items are drawn by a hash of their ids; their
events stay where they are asked for, and are dropped everywhere else. So no model can have learned of them but from
their content.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mufasa_rec.data.events import EventLog
from mufasa_rec.data.items import ALWAYS_FROM
from mufasa_rec.data.randomness import uniform

_STREAM = 17
_ASKED = 2  # events of a user that leave-one-out does not train on
_LEAST = 3  # events from which on a user is asked


@dataclass(frozen=True, kw_only=True)
class ColdConfig:
    """Items that are to be cold.

    Attributes:
        share: Share of the items whose training events are taken out; 0 for none.
        seed: Which ones.
    """

    share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"cold.share={self.share}: choose at least 0 and below 1, such as 0.1.")


def choose_cold(ids: np.ndarray, config: ColdConfig) -> np.ndarray:
    """Which of some items, by raw ids `[n]`, are cold, `[n]` bool; the same whatever else is in the catalog.

    Example:
        >>> cold = choose_cold(np.arange(1000), ColdConfig(share=0.1))
        >>> bool(70 < cold.sum() < 130), bool((cold[:9] == choose_cold(np.arange(9), ColdConfig(share=0.1))).all())
        (True, True)
    """
    return uniform(config.seed, _STREAM, ids) < config.share


def without_training_events(log: EventLog, cold_ids: np.ndarray) -> EventLog:
    """Take the training events of cold items out of a log.

    Args:
        log: Events, sorted by user and time.
        cold_ids: Raw ids of cold items, int64, ascending.

    Returns:
        The rest. A user of whom too few events are left to be asked is one for training, and loses all events of cold
        items; users without any event are gone.

    Raises:
        ValueError: When no event would be left to train on.
    """
    cold = np.isin(log.item, cold_ids)
    from_end = np.repeat(log.offsets[1:], log.lengths) - np.arange(len(log.item)) - 1
    keep = ~cold | (from_end < _ASKED)
    asked = _per_user(log, keep) >= _LEAST
    keep &= ~cold | np.repeat(asked, log.lengths)
    left = _per_user(log, keep)
    if not (keep & ~cold).any():
        raise ValueError("cold.share: no event is left to train on; choose a smaller share.")
    there = left > 0
    return replace(
        log,
        users=log.users[there],
        offsets=np.r_[0, np.cumsum(left[there])].astype(log.offsets.dtype),
        item=log.item[keep],
        timestamp=None if log.timestamp is None else log.timestamp[keep],
        columns={name: values[keep] for name, values in log.columns.items()},
    )


def released_later(available_from: np.ndarray, cold: np.ndarray) -> np.ndarray:
    """Release times `[n]` in which those of cold items are unknown: else they would be negatives in training."""
    return np.where(cold, ALWAYS_FROM, available_from)


def _per_user(log: EventLog, keep: np.ndarray) -> np.ndarray:
    """Events of each user that are kept, int64 `[U]`."""
    total = np.r_[0, np.cumsum(keep)]
    return total[log.offsets[1:]] - total[log.offsets[:-1]]
