"""``prepare --check``: good data passes, each broken promise is named; rows written elsewhere train as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mufasa_rec.data.check import check_dataset
from mufasa_rec.data.ids import hash_ids
from mufasa_rec.data.importers import ColumnsConfig
from mufasa_rec.data.items import ItemStore, write_item_store
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.schema import DatasetManifest, SplitManifest
from torchx_apps import prepare as app

EVENTS = "events/base/bucket-00000.parquet"
TRAIN = "splits/leave_one_out/train/base/bucket-00000.parquet"
TEST = "splits/leave_one_out/test/base/bucket-00000.parquet"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    columns = {
        "user": [1] * 5 + [2] * 4,
        "item": [10, 20, 30, 20, 40, 10, 20, 30, 40],
        "ts": [1_600_000_000 + k for k in range(9)],
        "label": [0, 1] * 4 + [1],
        "kind": ["a", "b", "a"] * 3,
    }
    pq.write_table(pa.table(columns), source / "interactions.parquet")
    np.savez(source / "title.npz", item_id=np.array([10, 20]), vector=np.eye(2, dtype=np.float32))
    config = PrepareConfig(input=str(source), output=str(tmp_path / "set"), columns=ColumnsConfig(action="kind"))
    prepare(config)
    return tmp_path / "set"


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a Parquet file in place, row group by row group."""
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    groups = [file.read_row_group(k).to_pydict() for k in range(file.num_row_groups)]
    change(groups[0])
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pydict(group, schema=schema))


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda group: group.update({name: value})


def test_good_data_set_has_no_problem(dataset: Path) -> None:
    assert check_dataset(str(dataset)) == []


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            EVENTS,
            _set("item", [[10, 20, 30, 20, 99]]),
            r"1 events have an item that is not in the item store \(first: 99\)",
        ),
        (EVENTS, _set("timestamp", [[5, 4, 6, 7, 8]]), r"timestamp falls within a user at 1 events; sort"),
        (EVENTS, _set("label", [[0.0, 1.0, 0.5, 1.0, 0.0]]), r"label is 0.5 in 1 events, must be 0 or 1"),
        (EVENTS, _set("action", [[1, 2, 3, 1, 1]]), r"action is 3 in 1 events, outside 0..2; code it"),
        (EVENTS, _set("action", [[1, 2, 1]]), r"column 'action' has lists of other lengths than 'item'"),
        (EVENTS, _set("item", [[10, None, 30, 20, 40]]), r"column 'item' has nulls"),
        (EVENTS, _set("user", [7]), r"users are not strictly ascending; sort the rows by user"),
        (
            TRAIN,
            _set("history_end", [9]),
            r"1 rows are out of range \(first: history_end 9, .* the user has 5 events\)",
        ),
        (TRAIN, _set("target_from", [0]), r"rows are out of range"),
        (TRAIN, _set("user", [2]), r"1 rows have a user that is not in row group 0 of the events"),
        (TEST, _set("target_from", [2]), r"a target is also a training event of its user"),
        (TEST, _set("target_from", [1]), r"has 2 rows and 5 targets, split.json says 2 and 2"),
    ],
)
def test_broken_promise_is_found_and_named(dataset: Path, path: str, change: Any, message: str) -> None:
    _rewrite(dataset / path, change)
    problems = check_dataset(str(dataset))
    assert any(_found(message, problem.message) for problem in problems), problems


def _found(pattern: str, text: str) -> bool:
    """Whether a problem says what is expected."""
    return re.search(pattern, text) is not None


def test_changed_bytes_are_found_by_their_checksum(dataset: Path) -> None:
    _rewrite(dataset / TRAIN, lambda group: None)
    assert [p.message for p in check_dataset(str(dataset))] == [
        "sha256 differs from split.json; the file was changed: prepare again"
    ]
    write_item_store(dataset, "1", ids=np.array([10, 20, 30, 40]), titles=pa.array(["a", "b", "c", "d"]))
    assert any("items/1" in p.file and "checksum differs" in p.message for p in check_dataset(str(dataset)))


def test_other_events_under_the_same_split_are_found(dataset: Path) -> None:
    _rewrite(dataset / EVENTS, _set("item", [[10, 20, 30, 40, 40]]))
    assert any("the split is of other events" in p.message for p in check_dataset(str(dataset)))


def test_row_groups_that_are_not_aligned_are_found(dataset: Path) -> None:
    pq.write_table(pq.read_table(dataset / TRAIN), dataset / TRAIN)
    messages = [p.message for p in check_dataset(str(dataset))]
    assert any("has 1 row groups, its events file has 2" in message for message in messages)


def test_missing_files_and_columns_are_found(dataset: Path) -> None:
    pq.write_table(pq.read_table(dataset / EVENTS).drop_columns(["label"]), dataset / EVENTS)
    (dataset / TEST).unlink()
    (dataset / "content/title/1/segment-00000.safetensors").write_bytes(b"x")
    files = {p.file for p in check_dataset(str(dataset))}
    assert {EVENTS, "splits/leave_one_out", "content/title/1"} <= files
    assert any("column 'label' of dataset.json is missing" in p.message for p in check_dataset(str(dataset)))


def test_the_program_lists_problems_and_exits_with_one(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app.main(["--check", str(dataset)])
    assert "keeps the contract" in capsys.readouterr().out
    (dataset / "dataset.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        app.main(["--check", str(dataset)])
    assert caught.value.code == 1
    assert "dataset.json: " in capsys.readouterr().out


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """What Spark would write: three folders of rows, ids by xxhash64."""
    a, b, c = hash_ids(["a", "b", "c"]).tolist()
    source = tmp_path / "rows"
    for part, lists, start in (
        ("train", [[a, b, c], [b, a]], [1, 1]),
        ("validation", [[a, b, c, a]], [3]),
        ("test", [[a, b, c, a, b]], [4]),
    ):
        (source / part).mkdir(parents=True)
        users = pa.array(list(range(1, len(lists) + 1)), pa.int64())
        times = pa.array([list(range(len(items))) for items in lists], pa.list_(pa.int64()))
        columns = {"user": users, "item": pa.array(lists, pa.list_(pa.int64())), "timestamp": times}
        table = pa.table(columns | {"target_from": pa.array(start, pa.int32())})
        pq.write_table(table, source / part / "part-0001.snappy.parquet")
    pq.write_table(pa.table({"item": ["a", "b", "c", "d"], "title": ["A", "B", "C", "D"]}), source / "items.parquet")
    return source


def test_rows_with_their_own_lists_become_a_data_set_byte_for_byte(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    manifest = prepare(PrepareConfig(input=str(rows), output=str(output), layout="rows"))
    assert manifest.splits["external"].layout == "lists"
    assert manifest.time.absolute
    copied = output / "splits/external/train/base/bucket-00000.parquet"
    assert copied.read_bytes() == (rows / "train/part-0001.snappy.parquet").read_bytes()
    parts = SplitManifest.load(output, "external").parts
    assert {part: (info.rows, info.targets) for part, info in parts.items()} == {
        "train": (2, 3),
        "validation": (1, 1),
        "test": (1, 1),
    }
    store = ItemStore.open(output, "1")
    assert sorted(store.raw_ids(np.arange(4))) == ["a", "b", "c", "d"]
    assert check_dataset(str(output)) == []
    assert DatasetManifest.load(output) == manifest


def test_rows_that_break_the_contract_are_refused_and_leave_nothing(rows: Path, tmp_path: Path) -> None:
    _rewrite(rows / "test/part-0001.snappy.parquet", _set("target_from", [9]))
    with pytest.raises(ValueError, match=r"1 problem\(s\) with the rows: .*target_from outside 1 <= target_from"):
        prepare(PrepareConfig(input=str(rows), output=str(tmp_path / "set"), layout="rows"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_manifest_of_rows_is_json_with_the_external_policy(rows: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(input=str(rows), output=str(tmp_path / "set"), layout="rows"))
    split = json.loads((tmp_path / "set/splits/external/split.json").read_text())
    assert (split["policy"], split["events_hash"]) == ("external", "")
