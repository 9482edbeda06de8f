"""The event log: order and ties, what is dropped and counted, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mufasa_rec.data.catalog import build_catalog
from mufasa_rec.data.events import EventLog, build_events, drop_nulls
from mufasa_rec.data.statistics import repeat_share, repeated_events, tie_share


def _build(columns: dict[str, Any], **options: Any) -> EventLog:
    table = pa.table(columns)
    users, items = np.asarray(columns["user"], np.int64), np.asarray(columns["item"], np.int64)
    return build_events(table, users, items, **({"absolute_times": "timestamp" in columns} | options))


def test_events_are_sorted_by_user_then_time_and_ties_keep_the_order_of_the_source() -> None:
    log = _build({"user": [2, 1, 1, 1, 2], "item": [5, 9, 8, 7, 6], "timestamp": [3, 2, 1, 2, 1]})
    assert log.users.tolist() == [1, 2]
    assert log.offsets.tolist() == [0, 3, 5]
    assert log.item.tolist() == [8, 9, 7, 6, 5]
    assert log.timestamp is not None
    assert log.timestamp.tolist() == [1, 2, 2, 1, 3]


def test_position_breaks_ties_of_time() -> None:
    columns = {"user": [1, 1, 1], "item": [5, 6, 7], "timestamp": [1, 1, 0], "position": [2, 1, 0]}
    assert _build(columns, sort_positions=True).item.tolist() == [7, 6, 5]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=40))
def test_order_equals_pythons_stable_sort(pairs: list[tuple[int, int]]) -> None:
    columns = {"user": [u for u, _ in pairs], "item": list(range(len(pairs))), "timestamp": [t for _, t in pairs]}
    expected = [item for _, item in sorted(zip(pairs, range(len(pairs)), strict=True), key=lambda pair: pair[0])]
    assert _build(columns).item.tolist() == expected


def test_relative_times_order_the_events_and_are_not_kept() -> None:
    log = _build({"user": [1, 1], "item": [5, 6], "timestamp": [2, 1]}, absolute_times=False)
    assert log.item.tolist() == [6, 5]
    assert log.timestamp is None


def test_columns_are_coded_from_one_and_zero_is_missing() -> None:
    log = _build({"user": [1, 1, 1], "item": [1, 2, 3], "action": ["view", None, "buy"], "device": [7, 7, 3]})
    assert log.columns["action"].tolist() == [2, 0, 1]
    assert log.columns["action"].dtype == np.int32
    assert log.columns["device"].tolist() == [2, 2, 1]
    assert log.vocabularies["action"].values == ["buy", "view"]
    assert log.features(user_text=False, item_text=False)["device"].cardinality == 2


def test_exact_duplicates_are_dropped_only_when_asked() -> None:
    columns = {"user": [1, 1, 1], "item": [5, 5, 5], "timestamp": [1, 1, 2]}
    assert _build(columns).item.size == 3
    log = _build(columns, drop_duplicates=True)
    assert log.item.size == 2
    assert log.dropped == {"exact duplicate": 1}


def test_events_without_ids_are_dropped_and_counted() -> None:
    table = pa.table({"user": [1, None, 2], "item": [None, 1, 3], "timestamp": [1, 2, 3]})
    left, dropped = drop_nulls(table, max_share=0.5)
    assert left.to_pydict() == {"user": [2], "item": [3], "timestamp": [3]}
    assert dropped == {"no user": 1, "no item": 1}


def test_too_many_events_without_ids_are_refused() -> None:
    table = pa.table({"user": [1, None], "item": [1, 1]})
    with pytest.raises(
        ValueError, match=r"1 of 2 have no user \(null or NaN\), 50.0% where --max-null-share allows 5.0%"
    ):
        drop_nulls(table, max_share=0.05)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [0.0, 2.0]},
            r"label is 2.0 in 1 of 2 events, must be 0 or 1; make it one with --columns.label-at-least",
        ),
        ({"label": [0.0, None]}, r"label is nan in 1 of 2 events, must be 0 or 1"),
        ({"weight": [1.0, -1.0]}, r"weight is -1.0 in 1 events, must be a number of at least 0"),
        ({"weight": [1.0, None]}, r"weight is nan in 1 events"),
        (
            {"position": [1, 0]},
            r"position does not ascend.*1 events \(first: event 2 has 0 after 1\).*--sort-positions",
        ),
        ({"position": [1, 1]}, r"1 events have the same position as another of their user"),
        ({"timestamp": [2, 1], "position": [0, 1]}, r"position and time contradict each other in 1 events"),
        ({"tags": [["a"], ["b"]]}, r"categorical 'tags' is .*; an event has one integer or text per column"),
    ],
)
def test_bad_values_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build({"user": [1, 1], "item": [1, 2], **columns})


def test_unsorted_positions_are_sorted_when_asked() -> None:
    log = _build({"user": [1, 2, 1], "item": [5, 6, 7], "position": [1, 0, 0]}, sort_positions=True)
    assert log.item.tolist() == [7, 5, 6]


def test_repeats_are_items_the_same_user_had_before() -> None:
    log = _build({"user": [1, 1, 1, 2, 2], "item": [5, 6, 5, 5, 5], "timestamp": [1, 2, 3, 1, 1]})
    assert repeated_events(log).tolist() == [False, False, True, False, True]
    assert repeat_share(log, repeated_events(log)) == pytest.approx(2 / 3)
    assert tie_share(log) == pytest.approx(1 / 5)


def test_catalog_unites_file_and_events_and_sorts_by_id() -> None:
    items = pa.table({"item": [9, 3], "title": ["nine", "three"], "genres": [["b", "a"], None]})
    catalog = build_catalog(items, pa.array([3, 5]), "add")
    assert catalog.ids.tolist() == [3, 5, 9]
    assert catalog.titles is not None
    assert catalog.titles.to_pylist() == ["three", None, "nine"]
    genres = catalog.categoricals["genres"]
    assert genres.offsets is not None
    assert (genres.values.tolist(), genres.offsets.tolist(), genres.cardinality) == ([2, 1], [0, 0, 0, 2], 2)
    assert catalog.vocabularies["genres"].values == ["a", "b"]
    assert (catalog.added, catalog.file_ids is not None and catalog.file_ids.tolist()) == (1, [9, 3])


def test_unknown_items_and_double_items_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"1 of 2 items of the events are not in the items file \(first: 5\).*--unknown-items"
    ):
        build_catalog(pa.table({"item": [3]}), pa.array([3, 5]), "refuse")
    with pytest.raises(ValueError, match=r"1 ids occur twice in the items file \(first: 3\); keep one row per item"):
        build_catalog(pa.table({"item": [3, 3]}), pa.array([3]), "add")
