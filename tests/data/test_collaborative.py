"""What is learned of training events: the numbers, that a file says its split, and that nothing else reaches it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from mufasa_rec.data.collaborative import (
    BehaviourConfig,
    CollaborativeVectors,
    closest,
    factorise,
    read_given,
)
from mufasa_rec.data.cooccurrence import Cooccurrence, count_pairs
from mufasa_rec.data.importers import ColumnsConfig
from mufasa_rec.data.item_lookup import ItemLookup, split_of
from mufasa_rec.data.parquet import list_row_groups
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.data.split_choice import SplitConfig
from tests.helpers.datasets import prepare_small, write_source

CONFIG = BehaviourConfig(window=3, width=8, neighbours=4)


def learned(dataset: str) -> tuple[Cooccurrence, CollaborativeVectors, np.ndarray, str]:
    manifest = DatasetManifest.load(dataset)
    ref, info = split_of(manifest, dataset, "leave_one_out")
    catalog = ItemLookup(dataset, manifest, info, modalities=())
    pairs = count_pairs(list_row_groups(dataset, manifest, ref, "train"), catalog, CONFIG.window)
    ids = np.asarray(catalog.items.ids)
    return pairs, factorise(pairs, ids, catalog.counts, catalog.split, CONFIG), closest(pairs, CONFIG), catalog.split


def prepared_with_other_last_events(folder: Path, changed: int) -> str:
    """The small data set, but the last `changed` events of every user are of other items."""
    source = write_source(folder / "source")
    table = pq.read_table(source / "interactions.parquet").to_pandas()
    table = table.sort_values(["user", "timestamp"], kind="stable").reset_index(drop=True)
    last = table.groupby("user").cumcount(ascending=False) < changed
    items = np.sort(table["item"].unique())
    place = np.searchsorted(items, table.loc[last, "item"])
    table.loc[last, "item"] = items[(place + 7) % len(items)]
    table.to_parquet(source / "interactions.parquet", index=False)
    columns = ColumnsConfig(action="action", weight="weight", item_categoricals=("genres", "kind"))
    prepare(PrepareConfig(input=str(source), output=str(folder / "dataset"), columns=columns))
    return str(folder / "dataset")


def test_pairs_are_those_of_a_loop_over_the_training_events(dataset: str) -> None:
    manifest = DatasetManifest.load(dataset)
    expected: dict[tuple[int, int], int] = {}
    pairs, _, _, _ = learned(dataset)
    ids = np.asarray(ItemLookup(dataset, manifest, split_of(manifest, dataset, "leave_one_out")[1]).items.ids)
    for partition in manifest.partitions:
        for file in sorted((Path(dataset) / "events" / partition.name).glob("*.parquet")):
            for items in pq.read_table(file, columns=["item"]).column("item").to_pylist():
                training = items[:-2] if len(items) >= 3 else items
                rows = np.searchsorted(ids, training).tolist()
                for later, b in enumerate(rows):
                    for a in rows[max(0, later - CONFIG.window) : later]:
                        if a != b:
                            key = (min(a, b), max(a, b))
                            expected[key] = expected.get(key, 0) + 1
    found = zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)
    assert dict(zip(found, pairs.count.tolist(), strict=True)) == expected


def test_cutting_users_into_short_rows_counts_the_same_pairs(dataset: str, tmp_path: Path) -> None:
    short = prepare_small(tmp_path, split=SplitConfig(targets_per_row=3))
    a, b = learned(dataset)[0], learned(short)[0]
    assert (a.left.tolist(), a.right.tolist(), a.count.tolist()) == (
        b.left.tolist(),
        b.right.tolist(),
        b.count.tolist(),
    )


def test_validation_and_test_events_reach_nothing_that_is_learned(tmp_path: Path) -> None:
    before = learned(prepared_with_other_last_events(tmp_path / "a", 0))
    after = learned(prepared_with_other_last_events(tmp_path / "b", 2))
    assert before[3] != after[3]  # the events did change, and the split's hash says so
    for name in ("left", "right", "count"):
        assert np.array_equal(getattr(before[0], name), getattr(after[0], name))
    for name in ("ids", "vectors", "num_events"):
        assert getattr(before[1], name).tobytes() == getattr(after[1], name).tobytes()
    assert np.array_equal(before[2], after[2])
    one_training_event = learned(prepared_with_other_last_events(tmp_path / "c", 3))
    assert one_training_event[1].vectors.tobytes() != before[1].vectors.tobytes()


def test_vectors_factorise_the_matrix() -> None:
    rng = np.random.default_rng(0)
    left, right = np.triu_indices(12, 1)
    pairs = Cooccurrence(left, right, rng.integers(1, 30, len(left)), 12)
    matrix = np.zeros((12, 12))
    matrix[left, right] = matrix[right, left] = pairs.ppmi()
    config = BehaviourConfig(width=12)
    found = factorise(pairs, np.arange(12) * 10, np.full(12, 9), "loo@1", config)
    size = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[::-1]
    assert found.ids.tolist() == [i * 10 for i in range(12)]
    np.testing.assert_allclose((found.vectors**2).sum(0), size, rtol=1e-4, atol=1e-5)


def test_items_that_are_chosen_together_lie_together(dataset: str) -> None:
    pairs, vectors, mined, _ = learned(dataset)
    unit = vectors.vectors / np.linalg.norm(vectors.vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    place = {row: i for i, row in enumerate(np.unique(np.r_[mined // pairs.num_items, mined % pairs.num_items]))}
    near = [cosines[place[int(c) // pairs.num_items], place[int(c) % pairs.num_items]] for c in mined]
    assert np.mean(near) > cosines.mean() + 0.1


def test_each_item_is_paired_with_its_closest() -> None:
    pairs = Cooccurrence(np.array([0, 0, 0]), np.array([1, 2, 3]), np.array([1, 1, 1]), 4)
    assert closest(pairs, BehaviourConfig(neighbours=1)).tolist() == [1, 2, 3]  # as the closest of 1, 2 and 3


def test_vectors_are_saved_with_their_split_and_read_back(tmp_path: Path) -> None:
    made = CollaborativeVectors(np.array([5, 2]), np.eye(2, 3, dtype=np.float32), np.array([9, 1]), "loo@1")
    made.save(tmp_path / "v.safetensors")
    back = CollaborativeVectors.load(tmp_path / "v.safetensors")
    vectors, events = back.of(np.array([2, 7, 5]))
    assert (back.split, events.tolist()) == ("loo@1", [1, 0, 9])
    assert vectors.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_given_file_of_another_or_unknown_split_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "given.safetensors"
    tensors = {"id": np.array([1, 3]), "vector": np.ones((2, 2), np.float32)}
    ids, events = np.array([1, 2, 3]), np.array([4, 5, 6])
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"behaviour\.split: unknown"):
        read_given(file, None, "loo@1", ids, events)
    assert read_given(file, "loo@1", "loo@1", ids, events).num_events.tolist() == [4, 6]
    save_file(tensors, file, metadata={"split": "loo@0"})
    with pytest.raises(ValueError, match="learned on split loo@0, but this run uses loo@1"):
        read_given(file, None, "loo@1", ids, events)
    with pytest.raises(ValueError, match="none of its 2 ids is an item"):
        read_given(file, "loo@1", "loo@1", np.array([8]), np.array([1]))


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("width", 0), ("shift", 0.0), ("source", "")])
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"behaviour.{name}"):
        replace(CONFIG, **{name: value})
