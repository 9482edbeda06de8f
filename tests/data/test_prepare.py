"""From a small folder to a data set: every file as the contract says, and nothing harmed when something is wrong."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import fsspec
import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from mufasa_rec.data import event_files
from mufasa_rec.data import schema as schema_module
from mufasa_rec.data.check import check_dataset
from mufasa_rec.data.importers import ColumnsConfig
from mufasa_rec.data.items import ItemStore
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.schema import DatasetManifest, SplitManifest
from mufasa_rec.data.split_choice import SplitConfig

SHARED = Path(__file__).parents[3] / "shared" / "data"
DAY_S = 86_400
# User 3 has one event, user 2 two, user 1 five with a repeat (item 10) and a tie (20 before 40).
EVENTS: dict[str, list[Any]] = {
    "user": [2, 1, 1, 3, 1, 2, 1, 1],
    "item": [10, 10, 30, 20, 20, 50, 40, 10],
    "ts": [1_600_000_000 + DAY_S * day for day in (0, 0, 1, 5, 2, 1, 2, 9)],
    "kind": ["view", "buy", "view", "view", None, "buy", "view", "view"],
}
ITEMS = {"item": [10, 20, 30, 40, 60], "title": ["A", "B", "C", None, "F"], "genres": ["x|y", "y", None, "x", "z"]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    pq.write_table(pa.table(EVENTS), folder / "interactions.parquet")
    pq.write_table(pa.table(ITEMS), folder / "items.parquet")
    vectors = np.eye(4, dtype=np.float16)
    np.savez(folder / "image.npz", item_id=np.array([10, 20, 30, 99]), vector=vectors)
    return folder


def _config(source: Path, **options: Any) -> PrepareConfig:
    usual: dict[str, Any] = {"output": str(source.parent / "set"), "columns": ColumnsConfig(action="kind")}
    return PrepareConfig(input=str(source), **(usual | options))


def test_events_rows_items_and_counts_of_a_small_folder(source: Path) -> None:
    config = _config(source)
    manifest = prepare(config)
    folder = Path(config.output)
    events = pq.read_table(folder / "events/base/bucket-00000.parquet").to_pydict()
    assert events["user"] == [1, 2, 3]
    assert events["item"] == [[10, 30, 20, 40, 10], [10, 50], [20]]
    assert events["action"] == [[1, 2, 0, 2, 2], [2, 1], [2]]
    assert events["timestamp"][1] == [1_600_000_000_000, 1_600_086_400_000]
    rows = {
        part: list(zip(*pq.read_table(folder / f"splits/leave_one_out/{part}/base").to_pydict().values(), strict=True))
        for part in ("train", "validation", "test")
    }
    assert rows == {"train": [(1, 3, 1), (2, 2, 1)], "validation": [(1, 4, 3)], "test": [(1, 5, 4)]}
    store = ItemStore.open(folder, manifest.items.generation)
    assert store.ids.tolist() == [10, 20, 30, 40, 50, 60]
    assert store.titles(np.arange(6)) == ["A", "B", "C", None, None, "F"]
    with safe_open(folder / "splits/leave_one_out/item_counts.safetensors", framework="np") as file:
        assert file.get_tensor("count").tolist() == [2, 1, 1, 0, 1, 0]
        assert file.metadata() == {"split": "leave_one_out", "split_hash": manifest.splits["leave_one_out"].hash}
    assert json.loads((folder / "vocabularies/action.json").read_text())["values"] == ["buy", "view"]


def test_manifest_and_report_say_what_was_found(source: Path) -> None:
    config = _config(source)
    manifest = prepare(config)
    folder = Path(config.output)
    assert DatasetManifest.load(folder) == manifest
    published = Path(schema_module.__file__).parent / "dataset.schema.json"
    jsonschema.validate(json.loads((folder / "dataset.json").read_text()), json.loads(published.read_text()))
    assert manifest.repeat_share == pytest.approx(1 / 5)
    assert not manifest.mask_seen_default
    assert manifest.time.absolute
    assert manifest.features["genres"].multi_valued
    assert manifest.statistics["features"]["genres"]["null_share"] == pytest.approx(2 / 6)
    assert manifest.statistics["features"]["action"]["null_share"] == pytest.approx(1 / 8)
    # Items 40, 50 and 60 have no image; item 50 is one of five training events; the test target is item 10.
    expected = {"missing_items": 0.5, "missing_training_events": 0.2, "missing_test_targets": 0.0}
    assert manifest.content["image"].coverage == pytest.approx(expected)
    text = (folder / "report.txt").read_text()
    for words in (
        "3 users, 6 items (5 with events), 8 events",
        "20.0 % of training events have no `image` vector",
        "1  `image` vectors of unknown items",
        "1 items occur in events only",
        "20.00% of targets are items the user had before; evaluation does not mask them by default",
    ):
        assert words in text


def test_prepared_data_keeps_the_contract_and_two_runs_are_equal(source: Path) -> None:
    first = prepare(_config(source))
    assert check_dataset(_config(source).output) == []
    second = prepare(_config(source, output=str(source.parent / "again")))
    assert first == second


def test_time_split_has_its_own_rows_and_hash(source: Path) -> None:
    borders = SplitConfig(validation_from="2020-09-14T12:00:00Z", test_from="2020-09-15T12:00:00Z")
    manifest = prepare(_config(source, split=borders))
    split = SplitManifest.load(_config(source).output, "time")
    assert split.borders == {"validation": 1_600_084_800_000, "test": 1_600_171_200_000}
    assert {part: info.rows for part, info in split.parts.items()} == {"train": 0, "validation": 2, "test": 1}
    assert split.hash != manifest.splits["leave_one_out"].hash


def test_text_ids_are_hashed_and_found_again(tmp_path: Path) -> None:
    columns = {"user": ["u1", "u1", "u2"], "item": ["p9", "q", "q"], "position": [0, 1, 0]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "interactions.parquet")
    np.savez(tmp_path / "in" / "title.npz", item_id=np.array(["q"]), vector=np.ones((1, 2), np.float32))
    manifest = prepare(PrepareConfig(input=str(tmp_path / "in"), output=str(tmp_path / "set")))
    store = ItemStore.open(tmp_path / "set", "1")
    assert sorted(store.raw_ids(np.arange(2))) == ["p9", "q"]
    assert manifest.features["item"].id_type == "string"
    assert manifest.content["title"].rows == 1
    assert list(manifest.splits) == ["leave_one_out"]


def test_row_groups_are_aligned_and_users_are_dealt_to_buckets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(900), rng.integers(1, 9, 900))
    columns = {"user": user, "item": rng.integers(0, 50, user.size), "position": np.arange(user.size)}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "interactions.parquet")
    manifest = prepare(PrepareConfig(input=str(tmp_path / "in"), output=str(tmp_path / "set"), buckets=3))
    assert manifest.buckets == 3
    assert check_dataset(str(tmp_path / "set")) == []
    groups = 0
    for bucket in range(3):
        file = pq.ParquetFile(tmp_path / "set/events/base" / event_files.bucket_file(bucket))
        users = file.read(columns=["user"])["user"].to_numpy()
        assert (event_files.bucket_of(users, 3) == bucket).all()
        groups += file.num_row_groups
    assert 4 * 64 <= groups <= 4 * 64 + 3


def test_target_folder_with_something_else_is_left_alone(source: Path) -> None:
    output = source.parent / "set"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--output .*set: exists and is no data set; it is left as it is"):
        prepare(_config(source, overwrite=True))
    assert (output / "thesis.txt").read_text() == "mine"


def test_data_set_of_another_source_is_replaced_only_when_asked(source: Path) -> None:
    prepare(_config(source, name="first"))
    prepare(_config(source, name="second"))  # the same source: replaced
    pq.write_table(pa.table(EVENTS | {"item": [1] * 8}), source / "interactions.parquet")
    with pytest.raises(ValueError, match=r"holds data set 'second', made from another source.*--overwrite"):
        prepare(_config(source))
    assert prepare(_config(source, overwrite=True, name="third")).name == "third"
    assert sorted(path.name for path in source.parent.iterdir()) == ["set", "source"]


def test_full_disk_leaves_what_was_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prepare(_config(source))

    def fail(*_: object) -> dict[str, str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mufasa_rec.data.preparation.write_events", fail)
    with pytest.raises(
        OSError, match=r"the disk is full: .* bytes were written for .*set.*nothing that was there before"
    ):
        prepare(_config(source))
    assert DatasetManifest.load(_config(source).output) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["set", "source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": SplitConfig(policies=("time",)), "columns": ColumnsConfig(position="n")},
            "'time' needs absolute times",
        ),
        ({"unknown_items": "refuse"}, r"1 of 5 items of the events are not in the items file \(first: 50\)"),
        ({"columns": ColumnsConfig(label="kind")}, r"column 'kind': of type string, must be numbers"),
        ({"columns": ColumnsConfig(label="n")}, r"label is 2.0 in 1 of 8 events, must be 0 or 1"),
        (
            {"columns": ColumnsConfig(event_categoricals=("genres",))},
            r"'genres' is a categorical of events and of items",
        ),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(source: Path, options: dict[str, Any], message: str) -> None:
    events = pa.table(EVENTS | {"n": [0, 0, 1, 0, 1, 1, 0, 2], "genres": ["x"] * 8})
    if "split" in options:
        events = events.drop_columns(["ts"]).set_column(3, "n", pa.array([0, 0, 1, 0, 2, 1, 3, 4]))
    pq.write_table(events, source / "interactions.parquet")
    with pytest.raises(ValueError, match=message):
        prepare(_config(source, **options))
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_bad_vectors_are_refused_and_leave_nothing(source: Path) -> None:
    np.savez(source / "bad.npz", item_id=np.array([10, 20]), vector=np.array([[1.0, np.nan], [1.0, 0.0]], np.float32))
    with pytest.raises(ValueError, match=r"bad"):
        prepare(_config(source))
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_events_of_unknown_items_can_be_dropped(source: Path) -> None:
    manifest = prepare(_config(source, unknown_items="drop"))
    assert manifest.statistics["events"] == 7
    assert "1  item not in the items file" in (Path(_config(source).output) / "report.txt").read_text()


@pytest.mark.parametrize("options", [{"max_null_share": 2.0}, {"buckets": 0}])
def test_impossible_options_are_named(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name}: is .*; must be"):
        PrepareConfig(input="a", output="b", **options)


@pytest.mark.parametrize("options", [{"policies": ("random",)}, {"test_from": "2020-01-01T00:00Z"}])
def test_impossible_splits_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"split\."):
        SplitConfig(**options)


def test_generated_catalog_is_prepared_with_its_oracle(tmp_path: Path) -> None:
    manifest = prepare(PrepareConfig(input="synthetic:3", output=str(tmp_path / "set")))
    assert sorted(manifest.content) == ["image", "title"]
    with safe_open(tmp_path / "set" / "oracle.safetensors", framework="np") as file:
        assert set(file.keys()) == {"user", "rank", "top"}
        assert file.metadata()["split_hash"] == manifest.splits["leave_one_out"].hash
    with pytest.raises(ValueError, match=r"--input 'synthetic:x': the seed must be a number; write synthetic:0"):
        prepare(PrepareConfig(input="synthetic:x", output=str(tmp_path / "other")))


@pytest.mark.skipif(not SHARED.exists(), reason="shared data folder not present")
def test_movielens_gives_every_user_a_test_target(tmp_path: Path) -> None:
    manifest = prepare(PrepareConfig(input=str(SHARED / "ml-1m"), output=str(tmp_path / "set")))
    assert SplitManifest.load(tmp_path / "set", "leave_one_out").parts["test"].rows == 6_040
    assert manifest.statistics["events"] == 1_000_209
    assert sorted(manifest.content) == ["plot", "poster", "title"]
    assert check_dataset(str(tmp_path / "set")) == []


@pytest.mark.skipif(not SHARED.exists(), reason="shared data folder not present")
def test_online_retail_without_what_is_no_product(tmp_path: Path) -> None:
    columns = ColumnsConfig(drop_items={"stock_code": "POST|M|DOT|C2|BANK CHARGES|PADS"})
    manifest = prepare(
        PrepareConfig(input=str(SHARED / "online-retail"), output=str(tmp_path / "set"), columns=columns)
    )
    assert manifest.statistics["events"] == 397_924 - 1_554
    assert manifest.repeat_share > 0.01
    assert not manifest.mask_seen_default


def test_data_set_is_written_to_and_read_from_an_object_store(source: Path) -> None:
    url = "memory://test_prepare/set"
    manifest = prepare(_config(source, output=url))
    assert DatasetManifest.load(url) == manifest
    assert check_dataset(url) == []
    with pytest.raises(ValueError, match=r"--output .*made from another source"):
        prepare(PrepareConfig(input="synthetic:0", output=url))
    fsspec.filesystem("memory").rm("/test_prepare", recursive=True)


def test_same_source_under_a_new_name_keeps_the_split_hash(source: Path) -> None:
    first = prepare(_config(source))
    second = prepare(_config(source, name="other", output=str(source.parent / "b")))
    assert first.splits == second.splits
