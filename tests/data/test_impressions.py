"""Impressions from raw forms to requests: labels, histories as of each request, splits, errors that write nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mufasa_rec.data.check import check_dataset
from mufasa_rec.data.importers.columns import ColumnsConfig
from mufasa_rec.data.importers.impression_columns import ImpressionsConfig
from mufasa_rec.data.items import ItemStore
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.requests import events_before
from mufasa_rec.data.schema import PARTS, DatasetManifest, SplitManifest
from mufasa_rec.data.synthetic_clicks import generate_clicks
from tests.helpers.impressions import SMALL, impressions_config, impressions_table, prepare_impressions, write_source


def rows_of(dataset: str, part: str | None = None) -> list[dict[str, Any]]:
    """Requests of a part, or of all, as dicts."""
    found = []
    for name in PARTS if part is None else (part,):
        for file in sorted(Path(dataset, "splits", "impressions", name, "base").iterdir()):
            found += pq.read_table(file).to_pylist()
    return found


def streams_of(dataset: str) -> dict[int, dict[str, Any]]:
    """Events of each user."""
    found = {}
    for file in sorted(Path(dataset, "events", "base").iterdir()):
        found |= {row["user"]: row for row in pq.read_table(file).to_pylist()}
    return found


def histories_of(dataset: str) -> dict[int, list[int]]:
    """Items that the request of each impression may know, by the impression's row in the source."""
    streams = streams_of(dataset)
    return {
        impression: streams[row["user"]]["item"][: row["history_end"]]
        for row in rows_of(dataset)
        for impression in row["impression"]
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_impressions(tmp_path_factory.mktemp("impressions"))


def test_every_impression_is_in_one_request_with_its_labels_context_and_numbers(dataset: str) -> None:
    source = impressions_table(generate_clicks(0, SMALL))
    rows = rows_of(dataset)
    number = np.concatenate([row["impression"] for row in rows])
    assert sorted(number) == list(range(len(source["user"])))
    values = {
        name: np.concatenate([row[name] for row in rows])
        for name in ("candidate", "label.click", "label.like", "context.surface", "dense.price")
    }
    np.testing.assert_array_equal(values["candidate"], source["item"][number])
    np.testing.assert_array_equal(values["label.click"], source["clicked"][number])
    np.testing.assert_array_equal(values["label.like"], source["liked"][number])
    np.testing.assert_allclose(values["dense.price"], source["price"][number], rtol=1e-6)
    names = np.array(["", "gallery", "search"])[values["context.surface"]]  # codes by the alphabet
    np.testing.assert_array_equal(names, np.array(source["surface"].to_pylist())[number])
    assert {len(row["candidate"]) for row in rows} == {SMALL.candidates}


def test_history_is_what_was_clicked_strictly_before_the_request(dataset: str) -> None:
    clicks, found = generate_clicks(0, SMALL), histories_of(dataset)
    for row in range(0, len(clicks.user), 7):
        before = (clicks.click_user == clicks.user[row]) & (clicks.click_timestamp < clicks.timestamp[row])
        assert found[row] == clicks.click_item[before].tolist()


def test_click_at_or_after_the_impression_changes_nothing(tmp_path: Path, dataset: str) -> None:
    """A click at the very time of an impression, and one a millisecond later, leave that impression's history alone."""
    source = write_source(tmp_path / "source")
    clicks = generate_clicks(0, SMALL)
    row = 4 * SMALL.candidates
    user, time = int(clicks.user[row]), int(clicks.timestamp[row])
    before = pq.read_table(source / "interactions.parquet")
    extra = {"user": [user, user, user], "item": [1, 2, 3], "timestamp": [time, time + 1, time - 1]}
    pq.write_table(pa.concat_tables([before, pa.table(extra)]), source / "interactions.parquet")
    old, new = histories_of(dataset), histories_of(prepare_impressions(tmp_path, source))
    assert new[row] == [*old[row], 3]  # the one before it does change it
    earlier = [r for r in old if clicks.user[r] != user or clicks.timestamp[r] < time - 1]
    assert all(new[r] == old[r] for r in earlier)


def test_events_at_the_time_of_the_request_are_not_before_it() -> None:
    found = events_before(
        np.array([2, 1, 3, 2]), np.array([10, 5, 1, 0]), np.array([1, 1, 2, 2, 2]), np.array([4, 5, 9, 10, 11])
    )
    assert found.tolist() == [1, 1, 0, 0]


def test_parts_are_split_by_time_and_every_part_is_later_than_the_one_before(dataset: str) -> None:
    times = {part: [row["request_time"] for row in rows_of(dataset, part)] for part in PARTS}
    assert max(times["train"]) < min(times["validation"]) <= max(times["validation"]) < min(times["test"])
    split = SplitManifest.load(dataset, "impressions")
    assert split.borders["train_end"] == max(times["train"])
    assert split.borders["test"] == min(times["test"])
    assert split.parts["test"].targets == sum(len(row["candidate"]) for row in rows_of(dataset, "test"))


def test_manifest_says_what_the_training_part_is_like(dataset: str) -> None:
    manifest = DatasetManifest.load(dataset)
    info, ref = manifest.impressions, manifest.split("impressions")
    assert info is not None and (ref.rows, ref.layout) == ("requests", "references")
    training = rows_of(dataset, "train")
    labels = np.concatenate([row["label.click"] for row in training])
    price = np.concatenate([row["dense.price"] for row in training])
    assert info.tasks == ["click", "like"] and info.context == {"surface": 2}
    assert info.rates["click"] == pytest.approx(labels.mean())
    assert info.dense["price"].mean == pytest.approx(np.nanmean(price), rel=1e-5)
    assert info.users == len({row["user"] for row in training})
    assert check_dataset(dataset) == []


def test_clicks_among_impressions_are_the_events_where_there_are_no_others(tmp_path: Path) -> None:
    dataset = prepare_impressions(tmp_path, write_source(tmp_path / "source", events=False))
    source = impressions_table(generate_clicks(0, SMALL))
    clicked = source["clicked"] == 1
    assert sum(len(stream["item"]) for stream in streams_of(dataset).values()) == clicked.sum()
    for row, history in histories_of(dataset).items():
        before = clicked & (source["user"] == source["user"][row]) & (source["timestamp"] < source["timestamp"][row])
        assert history == source["item"][before].tolist()
    assert check_dataset(dataset) == []


def test_ratings_are_impressions_when_asked_and_positive_ones_the_history(tmp_path: Path) -> None:
    folder = tmp_path / "ml"
    folder.mkdir()
    lines = [
        f"{user},{1 + (user * time) % 7},{1 + time % 5},{1_000_000_000 + 60 * time}"
        for user in (1, 2)
        for time in range(20)
    ]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n")
    movies = "".join(f"{item},Movie {item},Drama|Comedy\n" for item in range(1, 8))
    (folder / "movies.csv").write_text("movieId,title,genres\n" + movies)
    columns = ColumnsConfig(
        impressions=ImpressionsConfig(source="events", labels={"like": "rating"}, label_at_least={"like": 4})
    )
    output = str(tmp_path / "dataset")
    prepare(PrepareConfig(input=str(folder), output=output, columns=columns))
    rows = rows_of(output)
    assert sum(len(row["candidate"]) for row in rows) == 40
    assert sum(sum(row["label.like"]) for row in rows) == 16
    assert sum(len(stream["item"]) for stream in streams_of(output).values()) == 16


def own_history(times: bool) -> dict[str, Any]:
    """Columns of a history of its own for each impression, whose last event is later than the impression."""
    clicks = generate_clicks(0, SMALL)
    items = [[1, 2, 3] if row % 2 else [] for row in range(len(clicks.user))]
    stamps = [[t - 2, t - 1, t] if row % 2 else [] for row, t in enumerate(clicks.timestamp.tolist())]
    return (
        {"past": pa.array(items, pa.list_(pa.int64())), "past_time": pa.array(stamps, pa.list_(pa.int64()))}
        if times
        else {"past": pa.array(items, pa.list_(pa.int64()))}
    )


@pytest.mark.parametrize("times", [True, False], ids=["with times", "without"])
def test_own_history_is_kept_and_cut_where_it_has_times(tmp_path: Path, times: bool) -> None:
    source = write_source(tmp_path / "source", events=False, page=None, **own_history(times))
    clicks = generate_clicks(0, SMALL)
    alone = clicks.timestamp + clicks.position  # every impression a request of its own
    table = pq.read_table(source / "impressions.parquet")
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", pa.array(alone))
    pq.write_table(table, source / "impressions.parquet")
    named = {"history_item": "past", "history_time": "past_time"} if times else {"history_item": "past"}
    dataset = prepare_impressions(tmp_path, source, request=None, **named)
    lengths = {row["impression"][0]: row["item"] for row in rows_of(dataset)}
    for number, items in lengths.items():
        cut = times and clicks.position[number] == 0  # others were asked later than their history's last event
        assert items == ([] if number % 2 == 0 else [1, 2] if cut else [1, 2, 3])
    assert DatasetManifest.load(dataset).split("impressions").layout == "lists"
    assert check_dataset(dataset) == []


def test_items_of_own_histories_are_never_dropped_silently(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", events=False, **own_history(times=False))
    pq.write_table(pa.table({"item_id": [1, 2]}), source / "items.parquet")
    config = PrepareConfig(
        input=str(source),
        output=str(tmp_path / "out"),
        columns=impressions_config(history_item="past"),
        unknown_items="drop",
    )
    with pytest.raises(ValueError, match="--unknown-items drop: not for impressions with a history of their own"):
        prepare(config)


@pytest.mark.parametrize(
    ("columns", "change", "message"),
    [
        ({"clicked": np.full(960, 2)}, {}, r"column 'clicked': label is 2.0 in 960 of 960 impressions, must be 0 or 1"),
        ({"clicked": pa.nulls(960, pa.int64())}, {}, "960 impressions have no label; fill it"),
        ({"timestamp": None}, {}, "no column for the time of an impression, where the history must be cut"),
        ({"timestamp": pa.array([None, *range(1_700_000_000, 1_700_000_959)])}, {}, "'timestamp' is null in 1 of 960"),
        ({}, {"labels": {"click": "klick"}}, "column 'klick' is missing; the file has user, item"),
        ({}, {"context": ("device",)}, "column 'device' is missing"),
        ({"past": np.arange(960)}, {"history_item": "past"}, "must hold a list per impression"),
        ({"weight": np.full(960, -1.0)}, {"weight": "weight"}, "weight is -1.0 in 960 impressions"),
    ],
)
def test_bad_impressions_are_refused_before_anything_is_written(
    tmp_path: Path, columns: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    source = write_source(tmp_path / "source", **columns)
    with pytest.raises(ValueError, match=message):
        prepare_impressions(tmp_path, source, **change)
    assert not (tmp_path / "dataset").exists()


def test_events_without_times_cannot_give_histories(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    table = pq.read_table(source / "interactions.parquet")
    place = pa.array(np.arange(table.num_rows))
    pq.write_table(table.drop(["timestamp"]).append_column("position", place), source / "interactions.parquet")
    with pytest.raises(ValueError, match="events have no absolute times, so no history can be cut"):
        prepare_impressions(tmp_path, source)
    assert not (tmp_path / "dataset").exists()


def test_candidates_that_were_never_clicked_are_items_too(dataset: str) -> None:
    manifest = DatasetManifest.load(dataset)
    items = ItemStore.open(dataset, manifest.items.generation)
    assert (items.rows_of(np.unique(generate_clicks(0, SMALL).item)) >= 0).all()


def test_check_finds_a_history_that_reaches_to_its_request(tmp_path: Path, dataset: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    file = next(path for path in sorted(copy.glob("splits/impressions/test/base/*")))
    parquet = pq.ParquetFile(file)
    tables = [parquet.read_row_group(k) for k in range(parquet.num_row_groups)]
    with pq.ParquetWriter(file, parquet.schema_arrow) as writer:
        for table in tables:
            later = pa.array(np.zeros(table.num_rows, np.int64))
            table = table.set_column(table.column_names.index("request_time"), "request_time", later)
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    assert any("at or after their request" in problem.message for problem in check_dataset(str(copy)))


def test_columns_json_says_what_impressions_mean(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "columns.json").write_text('{"impressions": {"labels": {"like": "liked"}, "request": "page"}}')
    prepare(PrepareConfig(input=str(source), output=str(tmp_path / "dataset")))
    info = DatasetManifest.load(str(tmp_path / "dataset")).impressions
    assert info is not None and info.tasks == ["like"] and info.requests == SMALL.num_users * SMALL.requests


def test_config_of_impressions_is_checked() -> None:
    with pytest.raises(ValueError, match=r"negative_rate=0\.0: choose above 0"):
        impressions_config(negative_rate=0.0)
    with pytest.raises(ValueError, match="no task 'lik'; there are click, like"):
        impressions_config(label_at_least={"lik": 4})
    with pytest.raises(ValueError, match=r"name impressions\.history_item as well"):
        impressions_config(history_time="t")
