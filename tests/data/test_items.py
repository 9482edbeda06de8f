"""The item store: lookups, categoricals, text, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mufasa_rec.data.items import ALWAYS_FROM, ALWAYS_TO, Categorical, ItemStore, write_item_store


def _store(folder: Path) -> ItemStore:
    write_item_store(
        folder,
        "1",
        ids=np.array([-5, 2, 9]),
        raw_ids=pa.array(["minus", None, "nine"]),
        titles=pa.array(["A", None, "C"]),
        categoricals={
            "brand": Categorical(values=np.array([1, 0, 2]), offsets=None, cardinality=2),
            "genres": Categorical(values=np.array([3, 1]), offsets=np.array([0, 2, 2, 2]), cardinality=3),
            "values": Categorical(values=np.array([1, 1, 1]), offsets=None, cardinality=1),
        },
        available_from=np.array([0, ALWAYS_FROM, 7]),
    )
    return ItemStore.open(folder, "1")


def test_store_gives_back_what_was_written(tmp_path: Path) -> None:
    store = _store(tmp_path)
    assert len(store) == 3
    assert store.ids.tolist() == [-5, 2, 9]
    assert store.available_from.tolist() == [0, ALWAYS_FROM, 7]
    assert store.available_to.tolist() == [ALWAYS_TO] * 3
    assert sorted(store.categoricals) == ["brand", "genres", "values"]
    assert store.categoricals["brand"].values.dtype == np.int32
    genres = store.categoricals["genres"]
    assert genres.offsets is not None
    assert genres.values[genres.offsets[0] : genres.offsets[1]].tolist() == [3, 1]
    assert store.categoricals["genres"].cardinality == 3


def test_rows_of_finds_known_ids_and_marks_unknown_ones(tmp_path: Path) -> None:
    assert _store(tmp_path).rows_of(np.array([[9, 3], [-5, 100]])).tolist() == [[2, -1], [0, -1]]


def test_ids_without_gaps_need_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_item_store(tmp_path, "1", ids=np.arange(-3, 5))
    store = ItemStore.open(tmp_path, "1")
    monkeypatch.setattr(np, "searchsorted", None)
    limits = np.iinfo(np.int64)
    found = store.rows_of(np.array([[-3, 4], [-4, 5], [limits.min, limits.max]]))
    assert found.tolist() == [[0, 7], [-1, -1], [-1, -1]]
    assert found.dtype == np.int64


def test_rows_of_an_empty_store_is_all_unknown(tmp_path: Path) -> None:
    write_item_store(tmp_path, "1", ids=np.array([], np.int64))
    assert ItemStore.open(tmp_path, "1").rows_of(np.array([1, 2])).tolist() == [-1, -1]


def test_titles_and_source_ids_come_by_row(tmp_path: Path) -> None:
    store = _store(tmp_path)
    assert store.titles(np.array([2, 1, 2])) == ["C", None, "C"]
    assert store.raw_ids(np.array([1, 0])) == [2, "minus"]


def test_checksum_changes_with_the_content(tmp_path: Path) -> None:
    first = write_item_store(tmp_path, "1", ids=np.array([1, 2]))
    assert first == write_item_store(tmp_path, "2", ids=np.array([1, 2]))
    assert first != write_item_store(tmp_path, "3", ids=np.array([1, 3]))


def test_ids_that_are_not_ascending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"strictly ascending; sort them"):
        write_item_store(tmp_path, "1", ids=np.array([2, 2]))


def test_categorical_of_another_length_is_refused(tmp_path: Path) -> None:
    short = Categorical(values=np.array([1]), offsets=None, cardinality=1)
    with pytest.raises(ValueError, match=r"'brand' has 1 rows for 2 items"):
        write_item_store(tmp_path, "1", ids=np.array([1, 2]), categoricals={"brand": short})
