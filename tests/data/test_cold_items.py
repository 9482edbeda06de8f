"""A cold split: no training event of a cold item is left, what is asked for stays, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mufasa_rec.data.cold_items import ColdConfig, choose_cold, without_training_events
from mufasa_rec.data.events import EventLog
from mufasa_rec.data.item_lookup import ItemLookup, split_of
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.data.split_choice import SplitConfig
from mufasa_rec.data.splits import leave_one_out, training_counts
from tests.helpers.datasets import prepare_small

LOO = SplitConfig(policies=("leave_one_out",))


def log_of(streams: list[list[int]]) -> EventLog:
    offsets = np.r_[0, np.cumsum([len(stream) for stream in streams])]
    item = np.array([item for stream in streams for item in stream])
    columns = {"weight": np.arange(len(item), dtype=np.float32)}
    users, time = np.arange(len(streams)) + 100, np.arange(len(item))
    return EventLog(users=users, offsets=offsets, item=item, timestamp=time, columns=columns)


def test_cold_events_stay_only_where_they_are_asked_for() -> None:
    streams = [[9, 1, 2, 9, 3, 9], [1, 9, 9, 2], [9, 9, 9, 1, 9], [9], [4, 5]]
    left = without_training_events(log_of(streams), np.array([9]))
    found = [left.item[a:b].tolist() for a, b in zip(left.offsets[:-1], left.offsets[1:], strict=True)]
    # The third has no event left to be asked from, so it is for training; the fourth is gone.
    assert found == [[1, 2, 3, 9], [1, 9, 2], [1], [4, 5]]
    assert left.users.tolist() == [100, 101, 102, 104]
    assert left.timestamp is not None
    assert left.columns["weight"].tolist() == left.timestamp.tolist() == [1, 2, 4, 5, 6, 8, 9, 13, 16, 17]
    counts = training_counts(leave_one_out(left.lengths).parts["train"], left.offsets, left.item, 10)
    assert counts[9] == 0


def test_nothing_left_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no event is left to train on; choose a smaller share"):
        without_training_events(log_of([[9, 9, 9], [9]]), np.array([9]))


def test_prepared_cold_split_has_cold_targets_that_are_no_negatives(tmp_path: Path) -> None:
    folder = prepare_small(tmp_path, cold=ColdConfig(share=0.2, seed=3), split=LOO)
    whole = prepare_small(tmp_path / "whole", split=LOO)
    manifest, before = DatasetManifest.load(folder), DatasetManifest.load(whole)
    ref, split = split_of(manifest, folder, "leave_one_out")
    assert ref.hash != before.splits["leave_one_out"].hash
    catalog = ItemLookup(folder, manifest, split)
    cold = choose_cold(np.asarray(catalog.items.ids), ColdConfig(share=0.2, seed=3))
    assert 5 < cold.sum() < 30
    assert not catalog.counts[cold].any()
    assert not catalog.available[cold].any()
    assert split.parts["test"].rows > 100
    assert manifest.content.keys() == before.content.keys()


def test_generated_cold_split_hides_known_releases_and_has_no_oracle(tmp_path: Path) -> None:
    config = {"input": "synthetic:0", "output": str(tmp_path / "cold"), "split": LOO}
    prepare(PrepareConfig(**config, cold=ColdConfig(share=0.1)))  # type: ignore[arg-type]
    manifest = DatasetManifest.load(tmp_path / "cold")
    catalog = ItemLookup(str(tmp_path / "cold"), manifest, split_of(manifest, tmp_path / "cold", "leave_one_out")[1])
    cold = choose_cold(np.asarray(catalog.items.ids), ColdConfig(share=0.1))
    assert not catalog.counts[cold].any()
    assert not catalog.available[cold].any()
    assert not (tmp_path / "cold" / "oracle.safetensors").exists()
    assert len(load_file(tmp_path / "cold" / "splits" / "leave_one_out" / "item_counts.safetensors")["count"]) == 2000


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "give --split.policies leave_one_out"), ({"split": LOO, "layout": "rows"}, "and events instead of rows")],
)
def test_cold_needs_leave_one_out(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"cold\.share: is 0\.1.*" + message):
        PrepareConfig(input="x", output="y", cold=ColdConfig(share=0.1), **changes)
    with pytest.raises(ValueError, match=r"cold\.share=1\.0: choose at least 0 and below 1"):
        ColdConfig(share=1.0)
