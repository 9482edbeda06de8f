"""Importers: columns found or named; ids, times and lists as sources write them; what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from mufasa_rec.data.importers import ColumnsConfig, read_source

EVENTS = {"user_id": [1, 1, 2], "item_id": [10, 11, 10], "timestamp": [1_600_000_000, 1_600_000_060, 1_600_000_000]}


def _source(folder: Path, events: dict[str, Any], items: dict[str, Any] | None = None, *, csv: bool = False) -> str:
    for name, columns in (("interactions", events), ("items", items)):
        if columns is not None and csv:
            pa_csv.write_csv(pa.table(columns), folder / f"{name}.csv")
        elif columns is not None:
            pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize("csv", [False, True])
def test_columns_are_found_by_their_usual_names_and_the_choice_is_reported(tmp_path: Path, csv: bool) -> None:
    data = read_source(_source(tmp_path, EVENTS | {"price": [1.0, 2.0, 3.0]}, csv=csv), ColumnsConfig())
    assert data.events.column_names == ["user", "item", "timestamp"]
    assert data.events["timestamp"].to_pylist() == [1_600_000_000_000, 1_600_000_060_000, 1_600_000_000_000]
    assert data.absolute_times
    file = "interactions.csv" if csv else "interactions.parquet"
    assert f"{file}: user is 'user_id' (by its name)" in data.choices
    assert f"{file}: times are numbers, taken for s by their size" in data.choices
    assert data.ignored == {f"{file}: price": "not asked for"}


def test_a_relative_time_column_is_not_taken_for_a_timestamp(tmp_path: Path) -> None:
    events = {"user_id": [1, 1], "item_id": [1, 2], "position": [0, 1], "seconds_since_first": [0, 60]}
    data = read_source(_source(tmp_path, events), ColumnsConfig())
    assert data.events.column_names == ["user", "item", "position"]
    assert not data.absolute_times
    assert "interactions.parquet: seconds_since_first" in data.ignored


def test_flags_win_over_columns_json(tmp_path: Path) -> None:
    events = {"who": [1], "what": ["a"], "other": ["b"], "n": [0], "kind": ["view"]}
    _source(tmp_path, events)
    (tmp_path / "columns.json").write_text(
        json.dumps({"user": "who", "item": "what", "position": "n", "event_categoricals": ["kind"]})
    )
    data = read_source(str(tmp_path), ColumnsConfig(item="other"))
    assert data.events["item"].to_pylist() == ["b"]
    assert data.events["kind"].to_pylist() == ["view"]


def test_unknown_key_in_columns_json_is_named(tmp_path: Path) -> None:
    _source(tmp_path, EVENTS)
    (tmp_path / "columns.json").write_text('{"usr": "user_id"}')
    with pytest.raises(ValueError, match=r"columns.json: unknown key 'usr'; known are user, item"):
        read_source(str(tmp_path), ColumnsConfig())


def test_item_lists_come_from_parquet_lists_and_from_separated_text(tmp_path: Path) -> None:
    items = {"item_id": [10, 11, 12], "title": ["A", "B", None], "genres": ["x|y", "y", None]}
    data = read_source(_source(tmp_path, EVENTS, items, csv=True), ColumnsConfig())
    assert data.items is not None
    assert data.items["genres"].to_pylist() == [["x", "y"], ["y"], None]
    assert data.items["title"].to_pylist() == ["A", "B", None]
    other = tmp_path / "lists"
    other.mkdir()
    lists = {"item_id": [10, 11], "categories": [[1, 2], []], "plot": ["long text", "another"]}
    data = read_source(_source(other, EVENTS, lists), ColumnsConfig())
    assert data.items is not None
    assert data.items["categories"].to_pylist() == [[1, 2], []]
    assert data.ignored["items.parquet: plot"] == "not asked for"


def test_whole_numbers_that_were_read_as_floats_are_integers_again(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text("user,item,position\n1.0,2,0\n,3,1\n")
    assert read_source(str(tmp_path), ColumnsConfig()).events["user"].to_pylist() == [1, None]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            pa.array([1.5, 2.0]),
            r"column 'user': 1 ids are no exact whole numbers \(first: 1.5\) or out of range; write ids",
        ),
        (pa.array([2.0**60, 2.0]), r"or out of range; write ids as int64 or as text"),
        (pa.array([2**63, 1], pa.uint64()), r"column 'user': ids are out of range .* must fit int64"),
        (pa.array([True, False]), r"column 'user': ids of type bool are not ids"),
    ],
)
def test_ids_that_are_none_are_refused(tmp_path: Path, ids: pa.Array, message: str) -> None:
    source = _source(tmp_path, {"user": ids, "item": [1, 2], "position": [0, 0]})
    with pytest.raises(ValueError, match=message):
        read_source(source, ColumnsConfig())


@pytest.mark.parametrize(
    ("times", "unit", "timezone", "expected"),
    [
        (pa.array([1_600_000_000], pa.int32()), "auto", None, 1_600_000_000_000),
        ([1_600_000_000_123], "auto", None, 1_600_000_000_123),
        ([1_600_000_000_123_456], "auto", None, 1_600_000_000_123),
        ([1_600_000_000_123_456_789], "auto", None, 1_600_000_000_123),
        ([1_600_000_000.5], "auto", None, 1_600_000_000_500),
        (["2020-09-13T12:26:40Z"], "auto", None, 1_600_000_000_000),
        (["2020-09-13 14:26:40+02:00"], "iso", None, 1_600_000_000_000),
        (["2020-09-13 13:26:40"], "iso", "Europe/London", 1_600_000_000_000),
        (["2020-09-13"], "iso", "UTC", 1_599_955_200_000),
        # The clock shows 01:30 twice that night: the earlier one, still in summer time, is meant.
        (["2020-10-25 01:30:00"], "iso", "Europe/London", 1_603_585_800_000),
        (pa.array([1_600_000_000_000], pa.timestamp("ms")), "auto", "UTC", 1_600_000_000_000),
        (pa.array([1_600_000_000_000], pa.timestamp("ms", tz="Asia/Tokyo")), "auto", None, 1_600_000_000_000),
    ],
)
def test_times_become_milliseconds_utc(tmp_path: Path, times: Any, unit: Any, timezone: Any, expected: int) -> None:
    source = _source(tmp_path, {"user": [1], "item": [1], "ts": times})
    data = read_source(source, ColumnsConfig(time_unit=unit, timezone=timezone))
    assert data.events["timestamp"].to_pylist() == [expected]


@pytest.mark.parametrize(
    ("times", "timezone", "message"),
    [
        (
            ["2020-09-13 13:26:40"],
            None,
            r"column 'ts': times such as '2020-09-13 13:26:40' have no zone.*--columns.timezone",
        ),
        (pa.array([0], pa.timestamp("s")), None, r"have no zone.*--columns.timezone"),
        (["2020-09-13 13:26:40"], "Europe/Lundon", r"--columns.timezone 'Europe/Lundon' is not known"),
        (["yesterday"], "UTC", r"not a time in ISO 8601"),
        ([3600], None, r"the middle time is 1970-01-01, so these are no absolute times.*--columns.position"),
        ([10**18 * 9], None, r"after the year 2200; give the unit"),
    ],
)
def test_times_that_cannot_be_read_are_refused(tmp_path: Path, times: Any, timezone: str | None, message: str) -> None:
    source = _source(tmp_path, {"user": [1], "item": [1], "ts": times})
    with pytest.raises(ValueError, match=message):
        read_source(source, ColumnsConfig(timezone=timezone))


def test_times_with_and_without_a_zone_are_refused(tmp_path: Path) -> None:
    times = ["2020-09-13T12:26:40Z", "2020-09-13T12:26:40"]
    with pytest.raises(ValueError, match=r"1 of 2 times have no zone, the others have"):
        read_source(_source(tmp_path, {"user": [1, 1], "item": [1, 2], "ts": times}), ColumnsConfig())


def test_missing_column_names_itself_those_that_are_there_and_the_flag(tmp_path: Path) -> None:
    source = _source(tmp_path, {"buyer": [1], "item": [1], "ts": [1_600_000_000]})
    with pytest.raises(
        ValueError, match=r"no column for the user id; the file has buyer, item, ts; name it with --columns.user"
    ):
        read_source(source, ColumnsConfig())
    with pytest.raises(ValueError, match=r"column 'byer' \(user\) is missing; the file has buyer, item, ts"):
        read_source(source, ColumnsConfig(user="byer"))
    assert read_source(source, ColumnsConfig(user="buyer")).events.num_rows == 1


def test_events_without_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no column for the time or the position.*--columns.time or --columns.position"
    ):
        read_source(_source(tmp_path, {"user": [1], "item": [1]}), ColumnsConfig())


@pytest.mark.parametrize(
    ("text", "message"), [("", "the file is empty"), ("user,item,ts\n", r"the file is empty \(a header and no rows\)")]
)
def test_empty_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "interactions.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"interactions.csv: {message}"):
        read_source(str(tmp_path), ColumnsConfig())


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "interactions.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"interactions.parquet: cannot be read as Parquet"):
        read_source(str(tmp_path), ColumnsConfig())


def test_folder_without_events_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"no events file; there must be interactions.parquet/.csv.*the folder has notes.txt"
    ):
        read_source(str(tmp_path), ColumnsConfig())
    with pytest.raises(ValueError, match=r"--input .*absent: there is nothing"):
        read_source(str(tmp_path / "absent"), ColumnsConfig())


def test_two_files_for_one_thing_are_refused(tmp_path: Path) -> None:
    _source(tmp_path, EVENTS)
    _source(tmp_path, EVENTS, csv=True)
    with pytest.raises(ValueError, match=r"interactions.csv and interactions.parquet hold the same thing; keep one"):
        read_source(str(tmp_path), ColumnsConfig())


def test_a_folder_of_parts_is_read_as_one_file(tmp_path: Path) -> None:
    (tmp_path / "interactions").mkdir()
    for part in range(2):
        pq.write_table(pa.table(EVENTS), tmp_path / "interactions" / f"part-{part}.parquet")
    assert read_source(str(tmp_path), ColumnsConfig()).events.num_rows == 6


def test_every_other_file_with_vectors_is_a_modality(tmp_path: Path) -> None:
    _source(tmp_path, EVENTS, {"item_id": [10, 11]})
    np.savez(tmp_path / "title.npz", item_id=[10], vector=np.ones((1, 2), np.float16))
    np.save(tmp_path / "image.npy", np.ones((2, 3), np.float32))
    np.save(tmp_path / "image.ids.npy", np.array([10, 11]))
    pq.write_table(pa.table({"item_id": [10], "embedding": [[0.5, 0.5]]}), tmp_path / "audio.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    data = read_source(str(tmp_path), ColumnsConfig())
    assert sorted(data.vectors) == ["audio", "image", "title"]
    assert data.ignored["other.parquet"] == "neither events, items nor vectors"


def test_filter_drops_items_and_their_events(tmp_path: Path) -> None:
    items = {"item_id": [10, 11], "stock_code": ["POST", "22423"]}
    columns = ColumnsConfig(drop_items={"stock_code": "POST|M|DOT"})
    data = read_source(_source(tmp_path, EVENTS, items), columns)
    assert data.events["item"].to_pylist() == [11]
    assert data.items is not None
    assert data.items.to_pydict() == {"item": [11]}
    assert data.dropped == {"events of items dropped by the filter stock_code = POST|M|DOT": 2}


@pytest.mark.parametrize(
    ("column", "pattern", "message"), [("code", "X", "'code'.*is missing"), ("item_id", "(", "no regular expression")]
)
def test_filter_that_cannot_work_is_refused(tmp_path: Path, column: str, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_source(_source(tmp_path, EVENTS, {"item_id": [10, 11]}), ColumnsConfig(drop_items={column: pattern}))


def test_rating_becomes_a_label_when_asked(tmp_path: Path) -> None:
    source = _source(tmp_path, EVENTS | {"rating": [3.5, 4.0, 5.0]})
    data = read_source(source, ColumnsConfig(label="rating", label_at_least=4))
    assert data.events["label"].to_pylist() == [0.0, 1.0, 1.0]


def test_grouplens_files_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.0,964982703\n1,11,3.5,964982703\n")
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n10,"American President, The (1995)",Comedy|Drama\n11,"Null",(no genres listed)\n'
    )
    (tmp_path / "tags.csv").write_text("userId,movieId,tag,timestamp\n1,10,funny,964982703\n")
    data = read_source(str(tmp_path), ColumnsConfig())
    assert data.items is not None
    assert data.items.to_pydict() == {
        "item": [10, 11],
        "title": ["American President, The (1995)", "Null"],
        "genres": [["Comedy", "Drama"], []],
    }
    assert data.events["timestamp"].to_pylist() == [964982703000] * 2
    assert data.ignored["tags.csv"] == "neither events, items nor vectors"


def test_fingerprint_changes_with_the_content_and_not_with_the_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        _source(folder, EVENTS)
    same = read_source(str(first), ColumnsConfig()).fingerprint
    assert read_source(str(second), ColumnsConfig()).fingerprint == same
    _source(second, EVENTS | {"item_id": [10, 11, 12]})
    assert read_source(str(second), ColumnsConfig()).fingerprint != same
