"""Ids to rows to keys: by table or by search, and never with the counts or the vocabulary of another split."""

from __future__ import annotations

import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mufasa_rec.data.content_writer import write_content
from mufasa_rec.data.item_columns import ChosenItems
from mufasa_rec.data.item_lookup import ItemLookup, ItemVocabulary, _direct_table, split_of
from mufasa_rec.data.items import write_item_store
from mufasa_rec.data.negatives import NegativeSampler, NegativesConfig
from mufasa_rec.data.schema import ContentRef, DatasetManifest

COUNTS = "splits/leave_one_out/item_counts.safetensors"


def lookup(folder: str | Path, **options: Any) -> ItemLookup:
    manifest = DatasetManifest.load(folder)
    _, split = split_of(manifest, folder, "leave_one_out")
    return ItemLookup(folder, manifest, split, **options)


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "dataset"))


def test_table_and_search_find_the_same_rows(dataset: str) -> None:
    items = lookup(dataset)
    ids = np.asarray(items.items.ids)
    assert items._direct is not None
    by_table = items.rows_of(ids[::-1])
    items._direct = None
    assert by_table.tolist() == items.rows_of(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
    for bad in (-5, 10**12):
        with pytest.raises(ValueError, match=rf"1 ids of the events are not in the item store \(such as \[{bad}\]\)"):
            items.rows_of(np.array([ids[0], bad]))


def test_hashes_are_searched_for_and_small_ids_looked_up() -> None:
    assert _direct_table(np.array([-(10**18), 5, 10**18])) is None
    assert _direct_table(np.array([5, 10**18])) is None
    assert _direct_table(np.zeros(0, np.int64)) is None
    assert _direct_table(np.array([1, 3])).tolist() == [-1, 0, -1, 1]  # type: ignore[union-attr]


@given(st.sets(st.integers(-50, 50)), st.lists(st.integers(-60, 60)))
def test_key_is_one_more_than_the_place_and_zero_for_the_rest(known: set[int], asked: list[int]) -> None:
    vocabulary = ItemVocabulary(np.array(sorted(known), dtype=np.int64), "loo@0", 1)
    expected = [sorted(known).index(i) + 1 if i in known else 0 for i in asked]
    assert vocabulary.keys_of(np.array(asked, dtype=np.int64)).tolist() == expected


def test_rare_items_share_key_zero_and_the_vocabulary_survives_a_file(dataset: str, tmp_path: Path) -> None:
    items = lookup(dataset, min_count=5)
    assert ((items.keys[:] == 0) == (items.counts < 5)).all()
    items.vocabulary.save(tmp_path)
    again = ItemVocabulary.load(tmp_path)
    assert (again.split, again.min_count, again.ids.tolist()) == (items.split, 5, items.vocabulary.ids.tolist())
    assert lookup(dataset, vocabulary=again).keys[:].tolist() == items.keys[:].tolist()


def test_content_rows_are_where_the_store_has_the_ids(dataset: str) -> None:
    items = lookup(dataset)
    missing = 0
    for name, store in items.stores.items():
        place = {item: row for row, item in enumerate(store.ids.tolist())}
        wanted = [place.get(item, -1) for item in items.items.ids.tolist()]
        missing += wanted.count(-1)
        assert items.content_rows[name][:].tolist() == wanted
        assert items.content_rows[name][np.array([[5, 0], [7, 7]])].tolist() == [
            [wanted[5], wanted[0]],
            [wanted[7]] * 2,
        ]


def test_memory_of_a_lookup_does_not_grow_with_the_catalog(tmp_path: Path) -> None:
    """A million items with hashed ids, all of them with vectors, a hundred with an embedding of their own."""
    number, own = 1_000_000, 100
    ids = np.unique(np.random.default_rng(0).integers(-(2**62), 2**62, number + 99))[:number]
    write_item_store(tmp_path, "1", ids=ids)
    counts = np.zeros(number, np.int64)
    counts[:: number // own] = 9
    (tmp_path / "splits/s").mkdir(parents=True)
    save_file({"count": counts}, tmp_path / "splits/s/item_counts.safetensors", metadata={"split_hash": "h"})
    vectors = np.ones((number, 1), np.float16)
    ref = write_content(tmp_path, "title", ids[::-1].copy(), vectors, encoder="x", encoder_version="1")
    manifest: Any = SimpleNamespace(items=SimpleNamespace(generation="1"), content={"title": ref}, name="large")
    split: Any = SimpleNamespace(id="s", hash="h", borders={})
    tracemalloc.start()
    try:
        items = ItemLookup(tmp_path, manifest, split, min_count=5)
        rows = np.array([0, 5, number - 1])
        assert items.rows_of(ids[rows]).tolist() == rows.tolist()
        assert items.keys[rows].tolist() == [1, 0, 0]
        assert items.content_rows["title"][rows].tolist() == [number - 1, number - 6, 0]
        assert items.num_available == own
        assert tracemalloc.get_traced_memory()[0] < 0.1 * number
        assert items.available.sum() == own
        NegativeSampler(NegativesConfig(), items.available, items.counts, 1.0, seed=0)
        assert tracemalloc.get_traced_memory()[0] < 1.3 * number  # a byte an item, and an eighth
    finally:
        tracemalloc.stop()


@given(st.lists(st.booleans(), max_size=300), st.lists(st.integers(0, 299), max_size=20))
def test_chosen_items_are_found_by_their_place(flags: list[bool], places: list[int]) -> None:
    chosen, rows = ChosenItems(np.array(flags, bool)), np.flatnonzero(flags)
    assert len(chosen) == len(rows)
    asked = np.array([place for place in places if place < len(rows)], np.int64)
    assert chosen.rows(asked).tolist() == rows[asked].tolist()


def test_unknown_modality_is_named_with_those_there_are(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"data\.modalities: 'plot' is not in .* there are \['image', 'title'\]"):
        lookup(dataset, modalities=("plot",))
    assert sorted(lookup(dataset, modalities=("title",)).stores) == ["title"]


def test_vocabulary_of_another_split_is_refused_with_both_names(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"vocabulary: made from split time@abc, but this run uses leave_one_out@\w+"):
        lookup(dataset, vocabulary=ItemVocabulary(np.array([1]), "time@abc", 1))


def test_counts_of_another_split_are_refused_with_both_names(copy: Path) -> None:
    metadata = {"split": "time", "split_hash": "abc"}
    save_file({"count": np.zeros(90, np.int64)}, copy / COUNTS, metadata=metadata)
    with pytest.raises(ValueError, match=r"counted on split time@abc, but the split here is leave_one_out@\w+"):
        lookup(copy)


def test_counts_of_another_number_of_items_are_refused(copy: Path) -> None:
    _, split = split_of(DatasetManifest.load(copy), copy, "leave_one_out")
    save_file({"count": np.zeros(3, np.int64)}, copy / COUNTS, metadata={"split_hash": split.hash})
    with pytest.raises(ValueError, match="3 counts for 90 items; prepare the data set again"):
        lookup(copy)


def test_torn_file_is_named(copy: Path) -> None:
    (copy / COUNTS).write_bytes((copy / COUNTS).read_bytes()[:20])
    with pytest.raises(ValueError, match=r"item_counts\.safetensors: not a whole safetensors file"):
        lookup(copy)


def test_split_that_was_changed_is_refused(copy: Path) -> None:
    file = copy / "splits/leave_one_out/split.json"
    manifest = DatasetManifest.load(copy)
    file.write_text(file.read_text().replace(manifest.splits["leave_one_out"].hash, "0" * 64))
    with pytest.raises(ValueError, match=r"splits/leave_one_out: dataset\.json pins hash \w+, split\.json says 0+"):
        lookup(copy)


def test_items_that_could_not_be_chosen_are_no_negatives(dataset: str) -> None:
    items = lookup(dataset)
    assert (items.available >= (items.counts > 0)).all()
    assert not items.available[items.counts == 0].all()


@pytest.mark.parametrize("own", [True, False])
def test_vectors_learned_from_another_split_are_refused(copy: Path, own: bool) -> None:
    manifest = DatasetManifest.load(copy)
    _, split = split_of(manifest, copy, "leave_one_out")
    ids = np.asarray(lookup(copy).items.ids)
    learned = {"id": split.id, "hash": split.hash if own else "another"}
    vectors = np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32)
    written = write_content(copy, "learned", ids, vectors, encoder="x", encoder_version="1", split=learned)
    ref = ContentRef(generation=written.generation, width=8, dtype="float16", rows=len(ids), checksum=written.checksum)
    changed = replace(manifest, content={**manifest.content, "learned": ref})
    if own:
        assert "learned" in ItemLookup(copy, changed, split).stores
        return
    with pytest.raises(ValueError, match=r"modality 'learned': learned from split leave_one_out@another, but this run"):
        ItemLookup(copy, changed, split)
    assert "learned" not in ItemLookup(copy, changed, split, modalities=("title",)).stores
