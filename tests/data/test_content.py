"""The content store: what is written is read, what must not be stored is refused by name."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mufasa_rec.data.content import (
    ContentManifest,
    ContentStore,
    append_content,
    coverage,
    coverage_lines,
    generations,
    require_same,
    write_content,
)

ENCODER: dict[str, Any] = {"encoder": "demo", "encoder_version": "1"}
Draw = tuple[np.ndarray, np.ndarray]


def some_vectors(n: int, width: int = 8, seed: int = 0, first_id: int = 0) -> Draw:
    """Shuffled ids and Gaussian vectors."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(first_id, first_id + 3 * n, 3)).astype(np.int64)
    return ids, rng.standard_normal((n, width)).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Unique ids over the whole int64 range and non-zero vectors within float16's range."""
    full = st.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max)
    ids = draw(st.lists(full, min_size=1, max_size=20, unique=True))
    elements = st.floats(-60_000, 60_000, width=32)
    vectors = draw(hnp.arrays(np.float32, (len(ids), draw(st.integers(1, 5))), elements=elements))
    vectors[np.abs(vectors).max(1) < 1e-3] = 1
    return np.array(ids, np.int64), vectors


@settings(max_examples=25, deadline=None)
@given(draws())
def test_float16_store_returns_every_vector_in_float16(drawn: Draw) -> None:
    ids, vectors = drawn
    with tempfile.TemporaryDirectory() as folder:
        write_content(folder, "title", ids, vectors, normalise=False, **ENCODER)
        store = ContentStore.open(folder, "title", "1")
        assert (store.ids == ids).all()
        assert (store.rows_of(ids) == np.arange(len(ids))).all()
        np.testing.assert_array_equal(store.read(0, len(ids)).numpy(), vectors.astype(np.float16))
        np.testing.assert_array_equal(store.gather(store.rows_of(ids[::-1])), vectors[::-1].astype(np.float16))
        store.verify()


@settings(max_examples=25, deadline=None)
@given(draws())
def test_int8_error_is_at_most_half_a_step_of_the_rows_scale(drawn: Draw) -> None:
    ids, vectors = drawn
    with tempfile.TemporaryDirectory() as folder:
        write_content(folder, "title", ids, vectors, dtype="int8", normalise=False, **ENCODER)
        store = ContentStore.open(folder, "title", "1")
        step = np.abs(vectors).max(1, keepdims=True) / 127
        read = store.gather(np.arange(len(ids)))
        assert (np.abs(read - vectors) <= step * 0.5001).all()
        np.testing.assert_allclose(store.read(0, len(ids)).float().numpy(), read, rtol=1e-3, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(draws(), st.sampled_from(["float16", "int8"]))
def test_normalised_vectors_have_length_one(drawn: Draw, dtype: str) -> None:
    ids, vectors = drawn
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_content(folder, "title", ids, vectors, dtype=dtype, **ENCODER)
        read = ContentStore.open(folder, "title", "1").gather(np.arange(len(ids)))
    assert manifest.normalisation == "l2"
    np.testing.assert_allclose(np.linalg.norm(read, axis=1), 1, atol=1e-2)
    assert (np.sum(unit(read) * unit(vectors.astype(np.float64)), 1) > 0.999).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, unique=True), st.lists(st.integers(-5, 65)))
def test_rows_of_is_minus_one_exactly_for_absent_ids(present: list[int], asked: list[int]) -> None:
    ids = np.array(present, np.int64)
    with tempfile.TemporaryDirectory() as folder:
        half = max(1, len(ids) // 2)
        write_content(folder, "title", ids[:half], np.ones((half, 2), np.float32), **ENCODER)
        if len(ids) > half:
            append_content(folder, "title", ids[half:], np.ones((len(ids) - half, 2), np.float32), **ENCODER)
        rows = ContentStore.open(folder, "title", "1").rows_of(np.array(asked, np.int64))
    assert rows.tolist() == [present.index(item) if item in present else -1 for item in asked]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_append_keeps_old_rows_and_a_pinned_checksum_still_opens_them_alone(tmp_path: Path, dtype: str) -> None:
    ids, vectors = some_vectors(50)
    first = write_content(tmp_path, "title", ids, vectors, dtype=dtype, **ENCODER)
    before = ContentStore.open(tmp_path, "title", "1")
    old_rows = before.read(0, 50).clone()
    new_ids, new_vectors = some_vectors(20, seed=1, first_id=1000)
    second = append_content(tmp_path, "title", new_ids, new_vectors, **ENCODER)
    after = ContentStore.open(tmp_path, "title", "1")
    assert (second.rows, len(second.segments), second.generation) == (70, 2, "1")
    assert (after.read(0, 50) == old_rows).all()
    assert (before.read(0, 50) == old_rows).all()
    np.testing.assert_allclose(
        after.read(45, 70).numpy(), np.concatenate([before.read(45, 50), unit(new_vectors)]), atol=0.01
    )
    np.testing.assert_allclose(
        after.gather(np.array([60, -1, 2]))[[0, 2]], [unit(new_vectors)[10], unit(vectors)[2]], atol=0.01
    )
    assert (after.gather(np.array([60, -1, 2]))[1] == 0).all()
    assert after.ids.tolist() == [*ids, *new_ids]
    after.verify()
    pinned = ContentStore.open(tmp_path, "title", "1", checksum=first.checksum)
    assert pinned.rows == 50
    assert (pinned.rows_of(new_ids) == -1).all()
    assert second.checksum != first.checksum


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_some_rows_in_half_precision_are_those_that_a_table_reads_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    write_content(tmp_path, "title", *some_vectors(50), dtype=dtype, **ENCODER)
    append_content(tmp_path, "title", *some_vectors(20, seed=1, first_id=1000), **ENCODER)
    store = ContentStore.open(tmp_path, "title", "1")
    whole = store.read(0, 70)
    for rows in ([60, -1, 2, 2, 49, 50], [3, 1], [69], [-1], []):
        index = np.array(rows, np.int64)
        found = store.halves(index)
        assert found.dtype == torch.float16 and found.shape == (len(rows), store.width)
        assert torch.equal(found[index >= 0], whole[torch.from_numpy(index[index >= 0])])
        assert not found[index < 0].any()
    with pytest.raises(ValueError, match="rows 70 to 70 of `title`: give -1 or 0 to 69"):
        store.halves(np.array([70]))


def test_crash_before_the_manifest_swap_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, vectors = some_vectors(10)
    write_content(tmp_path, "title", ids, vectors, **ENCODER)
    new = some_vectors(5, first_id=1000)
    with monkeypatch.context() as patch:
        patch.setattr(ContentManifest, "to_json", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            append_content(tmp_path, "title", *new, **ENCODER)
    assert ContentStore.open(tmp_path, "title", "1").rows == 10
    append_content(tmp_path, "title", *new, **ENCODER)
    store = ContentStore.open(tmp_path, "title", "1")
    store.verify()
    assert store.rows == 15


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    ids, vectors = some_vectors(10)
    vectors[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        write_content(tmp_path, "title", ids, vectors, **ENCODER)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_corrupted_byte_is_named(tmp_path: Path) -> None:
    write_content(tmp_path, "title", *some_vectors(10), **ENCODER)
    path = tmp_path / "content/title/1/segment-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    store = ContentStore.open(tmp_path, "title", "1")
    with pytest.raises(ValueError, match=r"title/1/segment-00000.safetensors: sha256 is .* the file is damaged"):
        store.verify()


def test_truncated_or_missing_segment_is_named(tmp_path: Path) -> None:
    write_content(tmp_path, "title", *some_vectors(10), **ENCODER)
    path = tmp_path / "content/title/1/segment-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"segment-00000.safetensors: .*restore it"):
        ContentStore.open(tmp_path, "title", "1")
    path.unlink()
    with pytest.raises(ValueError, match=r"segment-00000.safetensors is missing"):
        ContentStore.open(tmp_path, "title", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "checksum is"),
        ({"encoder": "other"}, "checksum is"),
        ({"format_version": 2}, "format_version is 2, this program reads 1"),
        ({"surprise": 1}, r"\['surprise'\] are unknown or missing"),
        ({"rows": 11}, "rows is 11, but the segments hold 10"),
        ({"segments": [{"file": "../../x", "rows": 10, "sha256": ""}]}, r"segments are \['../../x'\]"),
        ({"segments": []}, r"segments are \[\]"),
        ({"segments": [{"file": "x"}]}, "missing 2 required"),
    ],
)
def test_edited_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_content(tmp_path, "title", *some_vectors(10), **ENCODER)
    path = tmp_path / "content/title/1/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        ContentStore.open(tmp_path, "title", "1")


def test_missing_generation_and_foreign_checksum_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest.json is missing; run prepare"):
        ContentStore.open(tmp_path, "title", "1")
    write_content(tmp_path, "title", *some_vectors(10), **ENCODER)
    with pytest.raises(ValueError, match="pinned is abc; its vectors were replaced"):
        ContentStore.open(tmp_path, "title", "1", checksum="abc")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="use letters, digits"):
        write_content(tmp_path, name, *some_vectors(10), **ENCODER)


def with_value(value: float, dtype: str = "float32") -> np.ndarray:
    """Ten vectors, one of which consists of a value."""
    vectors = some_vectors(10)[1].astype(dtype)
    vectors[4] = value
    return vectors


IDS = some_vectors(10)[0]


@pytest.mark.parametrize(
    ("ids", "vectors", "options", "message"),
    [
        (IDS, with_value(np.nan), {}, rf"`title`: 1 of 10 ids is NaN or infinite \(first: \[{IDS[4]}\]\); repair"),
        (IDS, with_value(-np.inf), {}, "NaN or infinite"),
        (IDS, with_value(0), {}, r"1 of 10 ids is zero vectors .*an absent id means no vector"),
        (IDS, with_value(1e5), {"normalise": False}, "outside the range of float16 .*store them normalised"),
        (IDS, with_value(1e-9), {"normalise": False, "dtype": "int8"}, "outside the range of float16"),
        (IDS[[0, 1, 0, 1]], with_value(1)[:4], {}, r"2 of 2 ids are listed more than once .*keep one vector"),
        (IDS, with_value(1)[:9], {}, r"shape \(9, 8\) for 10 ids; give \[n, P\]"),
        (IDS, with_value(1)[:, 0], {}, r"shape \(10,\) for 10 ids"),
        (IDS, with_value(1)[:, :0], {}, r"shape \(10, 0\) for 10 ids"),
        (IDS.astype(np.int32), with_value(1), {}, r"ids are int32 of shape \(10,\); give int64"),
        (IDS, with_value(1, "int64"), {}, "vectors are int64; give float16, float32 or float64"),
        (IDS, with_value(1), {"dtype": "float64"}, "dtype 'float64' is not known; use one of float16, int8"),
        (IDS, with_value(1), {"item_ids": np.array([-7])}, "none of its 10 ids is an item .*integers or strings"),
    ],
)
def test_vectors_unfit_for_the_store_are_refused(
    tmp_path: Path, ids: np.ndarray, vectors: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_content(tmp_path, "title", ids, vectors, **ENCODER, **options)


def test_generations_are_numbered_and_never_overwritten(tmp_path: Path) -> None:
    for number in ("1", "2"):
        assert write_content(tmp_path, "title", *some_vectors(10), **ENCODER).generation == number
    assert generations(tmp_path, "title") == ["1", "2"]
    with pytest.raises(ValueError, match="generation '2' exists and never changes"):
        write_content(tmp_path, "title", *some_vectors(10), generation="2", **ENCODER)


@pytest.mark.parametrize(
    ("width", "encoder", "message"),
    [
        (9, ENCODER, "modality `title` changed: width is 9, pinned is 8; give vectors of the pinned encoder"),
        (8, {**ENCODER, "encoder_version": "2"}, "encoder_version is '2', pinned is '1'"),
        (9, {**ENCODER, "encoder": "x"}, "encoder is 'x', pinned is 'demo'; width is 9, pinned is 8"),
    ],
)
def test_append_of_another_encoder_or_width_is_refused(
    tmp_path: Path, width: int, encoder: dict[str, Any], message: str
) -> None:
    write_content(tmp_path, "title", *some_vectors(10), **ENCODER)
    with pytest.raises(ValueError, match=message):
        append_content(tmp_path, "title", *some_vectors(10, width, first_id=1000), **encoder)


def test_append_of_a_present_id_is_refused_and_without_a_generation_too(tmp_path: Path) -> None:
    ids, vectors = some_vectors(10)
    with pytest.raises(ValueError, match="no generation to append to"):
        append_content(tmp_path, "title", ids, vectors, **ENCODER)
    write_content(tmp_path, "title", ids, vectors, **ENCODER)
    with pytest.raises(ValueError, match="10 of 10 ids are already in the generation, which never changes a vector"):
        append_content(tmp_path, "title", ids, vectors, **ENCODER)


def test_changed_dtype_and_normalisation_are_named_together() -> None:
    pinned = {"width": 8, "dtype": "float16", "normalisation": "l2"}
    require_same("poster", pinned, pinned)
    with pytest.raises(
        ValueError, match=r"`poster` changed: dtype is 'int8'.*; normalisation is 'none', pinned is 'l2'"
    ):
        require_same("poster", pinned, {**pinned, "dtype": "int8", "normalisation": "none"})


def test_vectors_of_unknown_items_are_dropped_and_counted(tmp_path: Path) -> None:
    ids, vectors = some_vectors(10)
    vectors[3] = np.nan  # not stored, so not judged
    known = np.sort(np.delete(ids, 3))
    manifest = write_content(tmp_path, "title", ids, vectors, item_ids=known, **ENCODER)
    assert (manifest.rows, manifest.dropped_unknown) == (9, 1)
    assert ContentStore.open(tmp_path, "title", "1").rows_of(ids).tolist() == [0, 1, 2, -1, 3, 4, 5, 6, 7, 8]


def test_coverage_counts_items_events_and_targets_without_a_vector(tmp_path: Path) -> None:
    ids, vectors = some_vectors(4)
    write_content(tmp_path, "poster", ids[:3], vectors[:3], **ENCODER)
    store = ContentStore.open(tmp_path, "poster", "1")
    shares = coverage(store, ids, np.array([5, 3, 1, 1]), np.array([0, 0, 1, 1]))
    assert shares == {"missing_items": 0.25, "missing_training_events": 0.1, "missing_test_targets": 0.5}
    assert coverage_lines("poster", shares)[1] == "10.0 % of training events have no `poster` vector"


def test_same_vectors_give_the_same_bytes_and_source_hash(tmp_path: Path) -> None:
    split = {"id": "leave_one_out", "hash": "abc"}
    first, second = (
        write_content(tmp_path / part, "title", *some_vectors(10), split=split, **ENCODER) for part in ("a", "b")
    )
    assert first == second
    assert ContentManifest.load(str(tmp_path / "a/content/title/1")).split == split
    other = write_content(tmp_path / "c", "title", *some_vectors(10, seed=1), **ENCODER)
    assert other.source_hash != first.source_hash


def test_rows_outside_the_store_are_refused(tmp_path: Path) -> None:
    write_content(tmp_path, "title", *some_vectors(10), **ENCODER)
    store = ContentStore.open(tmp_path, "title", "1")
    assert store.read(4, 4).shape == (0, 8)
    with pytest.raises(ValueError, match=r"rows \[5, 11\) of `title`: the store has 10 rows"):
        store.read(5, 11)
    with pytest.raises(ValueError, match=r"rows 10 to 10 of `title`: give -1 or 0 to 9"):
        store.gather(np.array([10]))


def test_a_store_behind_a_url_opens_from_the_cache() -> None:
    folder = "memory://content-test"
    ids, vectors = some_vectors(10)
    write_content(folder, "title", ids, vectors, **ENCODER)
    append_content(folder, "title", *some_vectors(5, first_id=1000), **ENCODER)
    store = ContentStore.open(folder, "title", "1")
    store.verify()
    assert store.rows == 15
    np.testing.assert_allclose(store.gather(np.arange(10)), unit(vectors), atol=1e-3)


def resident_bytes() -> int:
    """Resident memory of this process, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Generated:
    """Vectors that are made when they are read, as a file larger than memory would be."""

    shape = (400_000, 100)
    largest = 0

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        self.largest = max(self.largest, stop - start)
        return np.random.default_rng(start).standard_normal((stop - start, 100), np.float32)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_open_maps_the_file_and_write_holds_one_chunk(tmp_path: Path) -> None:
    source = Generated()
    write_content(tmp_path, "title", np.arange(len_ := source.shape[0]), source, **ENCODER)
    size = (tmp_path / "content/title/1/segment-00000.safetensors").stat().st_size
    assert size > 80_000_000
    assert source.largest < len_ / 10
    before = resident_bytes()
    store = ContentStore.open(tmp_path, "title", "1")
    view = store.read(100, len_ - 100)
    assert resident_bytes() - before < size / 10
    assert view[7].float().norm().item() == pytest.approx(1, abs=1e-2)
    view[0] = 0  # a private page: the file must not change
    store.verify()


def test_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/content.md").read_text()
    monkeypatch.chdir(tmp_path)
    np.savez("title.npz", item_id=np.array([1, 2]), vector=np.eye(2, 4))
    pq.write_table(pa.table({"id": [3], "vector": [[0.0, 1.0, 1.0, 0.0]]}), "title-of-new-items.parquet")
    found: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], found)
    assert found["rows"].tolist() == [2, 0, -1]
    np.testing.assert_allclose(found["vectors"][0], [0, 0.7071, 0.7071, 0], atol=0.01)
    assert found["shard"].shape == (1, 4)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_copied_rows_are_the_gathered_ones_over_segments(tmp_path: Path, dtype: str) -> None:
    ids, vectors = some_vectors(20)
    write_content(tmp_path, "title", ids[:13], vectors[:13], dtype=dtype, **ENCODER)
    append_content(tmp_path, "title", ids[13:], vectors[13:], **ENCODER)
    store = ContentStore.open(tmp_path, "title", "1")
    for start, stop in ((0, 20), (5, 13), (13, 20), (9, 16), (4, 4)):
        np.testing.assert_array_equal(store.copied(start, stop), store.gather(np.arange(start, stop)))
    with pytest.raises(ValueError, match="the store has 20 rows; stay inside"):
        store.copied(3, 21)
