"""What the columns of impressions mean: labels, request, context, numbers, an own history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ImpressionsConfig:
    """What the columns of impressions mean; user, item, time and units are those of the events.

    Attributes:
        source: ``auto`` takes `impressions.*` of the folder where it lies, ``events`` the events file, ``none`` none.
        labels: Task to column, the task that decides the clicks first; `click` or `label` by default, as task `click`.
        label_at_least: Task to the number from which on its label is 1 (4 for ratings); else labels are 0 or 1.
        request: Column of the request that an impression belongs to; without one, a user and a time make a request.
        context: Categorical columns of the situation (surface, device, hour).
        dense: Columns of numbers (position, price).
        weight: Column of an impression's weight in the loss.
        history: Which impressions become events where there is no events file: those with a positive first label, or
            ``all``.
        history_item: List column of the items that the user had clicked before, oldest first; an own history.
        history_time: List column of their times.
        negative_rate: Share of its negatives that the source kept; corrects the calibration.
    """

    source: Literal["auto", "events", "none"] = "auto"
    labels: dict[str, str] = field(default_factory=dict)
    label_at_least: dict[str, float] = field(default_factory=dict)
    request: str | None = None
    context: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    weight: str | None = None
    history: Literal["positive", "all"] = "positive"
    history_item: str | None = None
    history_time: str | None = None
    negative_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.negative_rate <= 1.0:
            raise ValueError(f"impressions.negative_rate={self.negative_rate}: choose above 0, at most 1.")
        for task in self.label_at_least:
            if self.labels and task not in self.labels:
                raise ValueError(f"impressions.label_at_least: no task {task!r}; there are {', '.join(self.labels)}.")
        if self.history_time is not None and self.history_item is None:
            raise ValueError(f"impressions.history_time={self.history_time!r}: name impressions.history_item as well.")
