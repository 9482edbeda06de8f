"""Rows are read from where they lie: any rows, from any number of files, and no byte more."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mufasa_rec.data.row_ids import RowIds, load_row_ids, match
from mufasa_rec.data.row_reader import RowBlock, RowReader, npy_rows, safetensors_header, safetensors_rows

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def in_files(folder: Path, matrix: torch.Tensor, borders: list[int]) -> RowReader:
    """A matrix cut at the borders into safetensors files, each beside another tensor."""
    blocks = []
    for number, (start, stop) in enumerate(zip([0, *borders], [*borders, len(matrix)], strict=True)):
        file = folder / f"{number}.safetensors"
        save_file({"aside": torch.ones(3), "rows": matrix[start:stop].contiguous()}, file)
        block, dim, dtype = safetensors_rows(file, "rows", start)
        assert (dim, dtype) == (matrix.shape[1], matrix.dtype)
        blocks.append(block)
    return RowReader("matrix", blocks[::-1], matrix.shape[1], matrix.dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_any_rows_come_from_any_files(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(23, 5).to(dtype)
    reader = in_files(tmp_path, matrix, [4, 4, 11])
    assert reader.rows == 23
    total = 0
    for rows in ([], [0], [22], [3, 4], [0, 1, 2, 9, 10, 11, 12, 20], list(range(23)), [5, 5, 6]):
        assert torch.equal(reader.read(np.array(rows, dtype=np.int64)), matrix[rows]), rows
        total += len(rows) * 5 * matrix.element_size()
    assert reader.bytes_read == total


def test_rows_come_from_an_object_store(tmp_path: Path) -> None:
    matrix = np.arange(60, dtype=np.float32).reshape(20, 3)
    np.save(tmp_path / "m.npy", matrix)
    fsspec.filesystem("memory").pipe_file("/rows/m.npy", (tmp_path / "m.npy").read_bytes())
    reader = npy_rows("memory://rows/m.npy")
    assert np.array_equal(reader.read(np.array([1, 2, 19])).numpy(), matrix[[1, 2, 19]])


def test_blocks_must_hold_every_row_once() -> None:
    blocks = [RowBlock(file="a", offset=0, first=first, rows=3) for first in (0, 4)]
    with pytest.raises(ValueError, match="no block that begins at row 3 but one at row 4"):
        RowReader("matrix", blocks, 2, torch.float32)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff" * 20,
        (2).to_bytes(8, "little") + b"[]",
        *(
            len(header).to_bytes(8, "little") + header
            for header in (
                json.dumps({"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}).encode(),
                json.dumps({"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]}}).encode(),
                json.dumps({"x": {"dtype": "F32", "shape": [-2, 2], "data_offsets": [16, 0]}}).encode(),
                json.dumps({"x": {"dtype": "P64", "shape": [2], "data_offsets": [0, 16]}}).encode(),
                json.dumps({"x": 1}).encode(),
            )
        ),
    ],
)
def test_damaged_header_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(text)
    with pytest.raises(ValueError, match=r"x\.safetensors: not a readable safetensors file"):
        safetensors_header(tmp_path / "x.safetensors")


def test_missing_tensor_and_wrong_shape_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor 'b'; there are \['a'\]"):
        safetensors_rows(tmp_path / "x.safetensors", "b")
    with pytest.raises(ValueError, match=r"tensor 'a' has shape \(3,\); give one row per id"):
        safetensors_rows(tmp_path / "x.safetensors", "a")


@given(st.lists(st.integers(-50, 50), unique=True), st.lists(st.integers(-50, 50)))
def test_match_finds_each_id_where_it_is(ids: list[int], wanted: list[int]) -> None:
    places = match(np.array(wanted, dtype=np.int64), np.array(ids, dtype=np.int64))
    assert places.tolist() == [ids.index(value) if value in ids else -1 for value in wanted]


def test_row_ids_are_read_as_written(tmp_path: Path) -> None:
    item = RowIds("t_item", np.array([5, -3, 1 << 62]))
    kinds = RowIds.of_values("t_item_kind", ("b", "a", "ü"))
    years = RowIds.of_values("t_item_year", (1999, 2001))
    for name, one in (("item", item), ("item.kind", kinds), ("item.year", years)):
        one.save(tmp_path, name)
    found = load_row_ids(tmp_path)
    assert list(found) == ["item", "item.kind", "item.year"]
    for name, one in (("item", item), ("item.kind", kinds), ("item.year", years)):
        assert (found[name].parameter, found[name].values, found[name].rows) == (one.parameter, one.values, one.rows)
        assert np.array_equal(found[name].ids, one.ids)
    assert years.ids.tolist() == [1999, 2001]
    assert load_row_ids(tmp_path / "nowhere") == {}
    (tmp_path / "row_ids" / "item.kind.json").write_text('{"values": 3}')
    with pytest.raises(ValueError, match=r"item\.kind\.json: holds no ids of rows"):
        load_row_ids(tmp_path)
