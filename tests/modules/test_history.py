"""Histories and candidates refuse what does not fit together, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.histories import make_candidates, make_history


def test_empty_and_missing_users_are_fine() -> None:
    make_history([])
    make_history([0, 0])
    make_candidates([0, 3, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedded": torch.zeros(5)}, r"History.embedded: shape \(5,\)"),
        ({"offsets": torch.tensor([0, 3, 4])}, "History.offsets: from 0 to 4 for 5 rows"),
        ({"offsets": torch.tensor([1, 3, 5])}, "History.offsets: from 1 to 5"),
        ({"offsets": torch.tensor([0, 6, 5])}, "never fall"),
        ({"offsets": torch.tensor([0, 3, 5], dtype=torch.int32)}, r"History.offsets: torch.int32.*\.long\(\)"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "History.offsets"),
        (
            {"start_position": torch.zeros(3, dtype=torch.int64)},
            r"History.start_position: shape \(3,\), expected \(2,\)",
        ),
        ({"timestamps_ms": torch.zeros(4, dtype=torch.int64)}, r"History.timestamps_ms: shape \(4,\), expected \(5,\)"),
        ({"timestamps_ms": torch.zeros(5)}, "History.timestamps_ms: torch.float32, expected int64"),
        ({"actions": torch.zeros(5, dtype=torch.bool)}, "History.actions: torch.bool"),
        ({"content": {"title": torch.zeros(4, 6)}}, r"History.content\['title'\]: shape \(4, 6\)"),
        ({"present": {}}, r"History.present\['title'\]: missing"),
        (
            {"present": {"image": torch.ones(5).bool(), "title": torch.ones(5)}},
            r"History.present\['title'\]: torch.float32",
        ),
    ],
)
def test_history_that_does_not_fit_together_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_history([3, 2]), **change)


def test_candidates_that_do_not_fit_together_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Candidates\.offsets: from 0 to 2 for 5 rows"):
        replace(make_candidates([3, 2]), offsets=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"Candidates\.request_time_ms"):
        replace(make_candidates([3, 2]), request_time_ms=torch.zeros(2, dtype=torch.int64))
