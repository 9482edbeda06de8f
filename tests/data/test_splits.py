"""Splits: rows of small examples by hand, and what must hold for any log."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mufasa_rec.data.event_files import _equal_bounds, _split_large, bucket_of
from mufasa_rec.data.splits import Rows, leave_one_out, time_borders, time_split, training_counts, training_rows

Triples = list[tuple[int, int, int]]


def _triples(rows: Rows) -> Triples:
    return list(zip(rows.user.tolist(), rows.history_end.tolist(), rows.target_from.tolist(), strict=True))


def test_leave_one_out_of_users_with_one_to_five_events() -> None:
    split = leave_one_out(np.array([1, 2, 3, 4, 5]))
    assert _triples(split.parts["train"]) == [(1, 2, 1), (3, 2, 1), (4, 3, 1)]
    assert _triples(split.parts["validation"]) == [(2, 2, 1), (3, 3, 2), (4, 4, 3)]
    assert _triples(split.parts["test"]) == [(2, 3, 2), (3, 4, 3), (4, 5, 4)]


def test_long_histories_are_cut_from_the_newest_end() -> None:
    assert _triples(training_rows(np.array([1, 6, 3]), 2)) == [(1, 2, 1), (1, 4, 2), (1, 6, 4), (2, 3, 1)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 7))
def test_each_training_event_but_the_first_is_a_target_once(lengths: list[int], most: int) -> None:
    rows = training_rows(np.array(lengths), most)
    assert ((rows.history_end - rows.target_from) <= most).all()
    targets = sorted((u, t) for u, end, start in _triples(rows) for t in range(start, end))
    assert targets == [(u, t) for u, n in enumerate(lengths) for t in range(1, n)]
    assert _triples(rows) == sorted(_triples(rows))


def test_time_split_asks_each_user_for_the_first_event_after_the_border() -> None:
    times = [
        [1, 2, 12, 13, 25],  # before, between and after: trained, validated and tested
        [1, 2, 3],  # before only
        [12, 13],  # between only: no history for validation
        [15, 20, 30],  # between and after: the event at T itself is the test target
        [21, 22],  # after only
        [5, 40],  # one training event: no training row, but it is history for the test
    ]
    offsets = np.r_[0, np.cumsum([len(t) for t in times])]
    split = time_split(offsets, np.concatenate(times), (10, 20))
    assert _triples(split.parts["train"]) == [(0, 2, 1), (1, 3, 1)]
    assert _triples(split.parts["validation"]) == [(0, 3, 2)]
    assert _triples(split.parts["test"]) == [(0, 5, 4), (3, 2, 1), (5, 2, 1)]
    assert split.borders == {"validation": 10, "test": 20}


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=8), min_size=1, max_size=8), st.data())
def test_time_split_never_trains_on_the_border_or_later(times: list[list[int]], data: st.DataObject) -> None:
    v = data.draw(st.integers(1, 48))
    t = data.draw(st.integers(v + 1, 50))
    times = [sorted(user) for user in times] + [[0, 50]]
    offsets = np.r_[0, np.cumsum([len(user) for user in times])]
    split = time_split(offsets, np.concatenate(times), (v, t))
    assert all(times[u][end - 1] < v for u, end, _ in _triples(split.parts["train"]))
    for part, low, high in (("validation", v, t), ("test", t, 51)):
        asked = {u: target for u, end, target in _triples(split.parts[part]) if end == target + 1}
        expected = {}
        for u, user in enumerate(times):
            later = [k for k, time in enumerate(user) if time >= low]
            if later and later[0] > 0 and user[later[0]] < high:
                expected[u] = later[0]
        assert asked == expected


def test_time_split_without_two_sides_is_refused() -> None:
    offsets, times = np.array([0, 2]), np.array([5, 6])
    with pytest.raises(ValueError, match=r"validation border 9 must be before the test border 9"):
        time_split(offsets, times, (9, 9))
    with pytest.raises(ValueError, match=r"the times go from 5 to 6"):
        time_split(offsets, times, (7, 9))
    with pytest.raises(ValueError, match=r"test_share=0.9: both must be above 0 and together below 1"):
        time_borders(times, 0.1, 0.9)


def test_borders_are_quantiles_of_the_event_times() -> None:
    assert time_borders(np.arange(100), 0.1, 0.1) == (80, 90)


def test_counts_are_of_the_training_part_and_count_each_event_once() -> None:
    lengths = np.array([5, 1, 2])
    offsets = np.r_[0, np.cumsum(lengths)]
    items = np.array([0, 1, 1, 2, 3, 0, 0, 4])
    split = leave_one_out(lengths, targets_per_row=1)
    # User 0 trains on its first three events, user 1 has no row, user 2 trains on both.
    assert training_counts(split.parts["train"], offsets, items, 5).tolist() == [2, 2, 0, 0, 1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 100))
def test_row_groups_are_never_empty_and_as_many_as_asked(work: list[int], groups: int) -> None:
    groups = min(groups, len(work))
    bounds = _equal_bounds(np.array(work), groups)
    assert bounds[0] == 0
    assert bounds[-1] == len(work)
    assert bounds.size == groups + 1
    assert (np.diff(bounds) > 0).all()


def test_row_groups_of_too_many_events_are_cut_at_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mufasa_rec.data.event_files.MAX_GROUP_EVENTS", 10)
    assert _split_large(np.array([0, 5, 6]), np.array([6, 4, 1, 30, 2, 3])).tolist() == [0, 2, 3, 4, 5, 6]


def test_buckets_share_users_evenly_and_are_fixed_for_ever() -> None:
    buckets = bucket_of(np.arange(10_000), 8)
    assert np.bincount(buckets, minlength=8).min() > 1_100
    assert bucket_of(np.array([0, 1, 2, -1]), 8).tolist() == bucket_of(np.array([0, 1, 2, -1]), 8).tolist()
