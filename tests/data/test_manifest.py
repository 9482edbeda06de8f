"""Manifests: the published schemas and the program accept the same documents, and refuse by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import mufasa_rec.data.schema as schema_module
from mufasa_rec.data.manifest_json import to_json
from mufasa_rec.data.schema import (
    ContentRef,
    DatasetManifest,
    Feature,
    ItemStoreRef,
    PartInfo,
    Partition,
    SplitManifest,
    SplitRef,
    TimeInfo,
    published_schemas,
)


def _manifest() -> DatasetManifest:
    return DatasetManifest(
        format_version=1,
        name="small",
        created_by="a test",
        time=TimeInfo(absolute=True, minimum_ms=1, maximum_ms=2),
        features={"item": Feature(level="event", kind="id", id_policy="vocabulary", cardinality=3)},
        partitions=[Partition(name="base", users=1, events=3)],
        buckets=1,
        items=ItemStoreRef(generation="1", count=3, checksum="c"),
        content={"title": ContentRef(generation="1", width=4, dtype="float16", rows=3, checksum="c")},
        splits={"leave_one_out": SplitRef(id="leave_one_out", hash="h")},
        tie_rule="stable",
        repeat_share=0.0,
        mask_seen_default=True,
    )


def _published(name: str) -> dict[str, Any]:
    return json.loads((Path(schema_module.__file__).parent / name).read_text())


@pytest.mark.parametrize("name", sorted(published_schemas()))
def test_published_schema_is_that_of_the_program(name: str) -> None:
    assert _published(name) == published_schemas()[name]
    jsonschema.Draft202012Validator.check_schema(_published(name))


def test_manifest_comes_back_as_it_was_saved_and_keeps_the_schema(tmp_path: Path) -> None:
    manifest = _manifest()
    manifest.save(tmp_path)
    assert DatasetManifest.load(tmp_path) == manifest
    jsonschema.validate(json.loads((tmp_path / "dataset.json").read_text()), _published("dataset.schema.json"))
    part = PartInfo(rows=1, targets=1)
    split = SplitManifest(id="x", policy="time", hash="h", events_hash="e", parts={"train": part}, files={"f": "1"})
    split.save(tmp_path)
    assert SplitManifest.load(tmp_path, "x") == split
    jsonschema.validate(json.loads((tmp_path / "splits/x/split.json").read_text()), _published("split.schema.json"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["buckets"], "1", r"dataset.json: buckets: is '1' \(str\); must be of type int"),
        (["buckets"], True, r"dataset.json: buckets: is True \(bool\); must be of type int"),
        (["nmae"], "x", r"dataset.json: unknown key 'nmae'; known are format_version, name"),
        (["features", "item", "kind"], "idd", r"features.item: kind: is 'idd'; must be one of 'id', 'categorical'"),
        (["partitions", 0, "users"], None, r"partitions\[0\]: users: is None"),
        (["content", "title", "width"], 1.5, r"content.title: width: is 1.5 \(float\)"),
    ],
)
def test_program_and_schema_refuse_the_same(tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    document = to_json(_manifest())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        DatasetManifest.load(tmp_path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, _published("dataset.schema.json"))


def test_missing_key_file_and_version_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset.json: no such file; check the path, or prepare"):
        DatasetManifest.load(tmp_path)
    document = to_json(_manifest())
    for change, message in (
        ({"format_version": 2}, r"format_version is 2, this program reads 1; prepare the data set again"),
        ({"items": {"generation": "1", "count": 3}}, r"dataset.json: items: key 'checksum' is missing"),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps(copy.deepcopy(document) | change))
        with pytest.raises(ValueError, match=message):
            DatasetManifest.load(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json: not valid JSON .*; restore the file"):
        DatasetManifest.load(tmp_path)


def test_split_that_is_not_there_is_explained() -> None:
    manifest = _manifest()
    assert manifest.split("leave_one_out").hash == "h"
    with pytest.raises(ValueError, match=r"split 'time' is not in data set 'small'; there are: leave_one_out"):
        manifest.split("time")
