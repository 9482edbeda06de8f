"""Vector files of every format give the same ids and vectors; malformed ones are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mufasa_rec.data.ids import hash_ids
from mufasa_rec.data.vectors import read_vectors

RNG = np.random.default_rng(0)
IDS = RNG.permutation(30_000).astype(np.int64)
VECTORS = RNG.standard_normal((30_000, 3)).astype(np.float32)
TEXT_IDS = [f"item {number}" for number in IDS]


def write_npy(folder: Path) -> Path:
    np.save(folder / "title.npy", VECTORS)
    np.save(folder / "title.ids.npy", IDS)
    return folder / "title.npy"


def write_npz(folder: Path) -> Path:
    np.savez(folder / "title.npz", item_id=IDS, vector=VECTORS)
    return folder / "title.npz"


def write_compressed_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "title.npz", id=IDS, embedding=np.asfortranarray(VECTORS))
    return folder / "title.npz"


def write_parquet(folder: Path) -> Path:
    table = pa.table({"id": IDS, "vector": pa.array(list(VECTORS), pa.list_(pa.float32()))})
    pq.write_table(table, folder / "title.parquet", row_group_size=7000)
    return folder / "title.parquet"


def write_fixed_parquet(folder: Path) -> Path:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), 3)
    pq.write_table(pa.table({"item_id": IDS, "embedding": lists}), folder / "title.parquet")
    return folder / "title.parquet"


def write_safetensors(folder: Path) -> Path:
    save_file({"id": torch.from_numpy(IDS), "vector": torch.from_numpy(VECTORS)}, folder / "title.safetensors")
    return folder / "title.safetensors"


WRITERS = [write_npy, write_npz, write_compressed_npz, write_parquet, write_fixed_parquet, write_safetensors]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_ids_and_vectors(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    ids, vectors = read_vectors(write(tmp_path))
    assert ids.dtype == np.int64
    assert (ids == IDS).all()
    assert tuple(vectors.shape) == VECTORS.shape
    for start, stop in [(0, 5), (5, 9000), (9000, 9000), (8000, 8100), (20_000, 40_000), (0, 30_000), (29_999, 30_000)]:
        np.testing.assert_array_equal(vectors[start:stop], VECTORS[start:stop])


def test_bfloat16_safetensors_are_read_as_float32(tmp_path: Path) -> None:
    path, vectors = tmp_path / "title.safetensors", torch.from_numpy(VECTORS).bfloat16()
    save_file({"id": torch.from_numpy(IDS), "vector": vectors}, path)
    np.testing.assert_array_equal(read_vectors(path)[1][10:20], vectors[10:20].float().numpy())


def test_string_ids_are_hashed_in_every_format_that_can_hold_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", id=np.array(TEXT_IDS), vector=VECTORS)
    np.savez(tmp_path / "b.npz", id=np.char.encode(np.array(TEXT_IDS), "utf-8"), vector=VECTORS)
    lists = pa.array(list(VECTORS))
    pq.write_table(pa.table({"id": TEXT_IDS, "vector": lists}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"id": pa.array(TEXT_IDS).dictionary_encode(), "vector": lists}), tmp_path / "d.parquet")
    for name in ("a.npz", "b.npz", "c.parquet", "d.parquet"):
        assert (read_vectors(tmp_path / name)[0] == hash_ids(TEXT_IDS)).all(), name


def test_npy_without_ids_follows_the_given_item_order(tmp_path: Path) -> None:
    np.save(tmp_path / "title.npy", VECTORS)
    assert (read_vectors(tmp_path / "title.npy", item_ids=IDS)[0] == IDS).all()
    with pytest.raises(ValueError, match=r"holds no ids; put them beside it as title.ids.npy"):
        read_vectors(tmp_path / "title.npy")
    with pytest.raises(ValueError, match="29999 ids but 30000 vectors"):
        read_vectors(tmp_path / "title.npy", item_ids=IDS[1:])


def ragged() -> dict[str, Any]:
    return {"id": [1, 2], "vector": [[1.0, 2.0], [3.0]]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (ragged(), "column 'vector' holds lists of 2 and of 1 values"),
        ({"id": [1, 2], "vector": [[1.0], None]}, "column 'vector' holds 1 nulls; leave items without a vector out"),
        ({"id": [1, None], "vector": [[1.0], [2.0]]}, "column 'id' holds 1 nulls"),
        ({"id": [1, 2], "vector": [1.0, 2.0]}, "column 'vector' has type double; give a list"),
        ({"id": [1, 2], "vector": [["a"], ["b"]]}, "has type list<.*string>; give a list of float16"),
        ({"id": [1.5, 2], "vector": [[1.0], [2.0]]}, "ids of type float64 are not ids"),
        ({"key": [1, 2], "vector": [[1.0], [2.0]]}, r"no id array among \['key', 'vector'\]; name it one of item_id"),
        ({"id": [1, 2], "v": [[1.0], [2.0]]}, r"no vector array among \['id', 'v'\]; name it one of vector"),
        ({"id": [], "vector": pa.array([], pa.list_(pa.float32()))}, r"shape \(0, 0\)"),
    ],
)
def test_malformed_parquet_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "title.parquet")
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / "title.parquet")


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet", "safetensors"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"title.{suffix}"
    path.write_bytes(b"no such format" * 10)
    with pytest.raises(ValueError, match=f"vector file .*title.{suffix}"):
        read_vectors(path, item_ids=IDS)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}, None], dtype=object)
    np.save(tmp_path / "title.npy", objects, allow_pickle=True)
    with pytest.raises(ValueError, match=r"Python objects.*numpy\.save"):
        read_vectors(tmp_path / "title.npy", item_ids=IDS[:2])
    np.savez(tmp_path / "title.npz", id=objects, vector=VECTORS[:2])
    with pytest.raises(ValueError, match="array 'id' holds Python objects"):
        read_vectors(tmp_path / "title.npz")


def test_unknown_format_and_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format '.pkl' is not known; convert it to one of .npy, .npz, .parquet"):
        read_vectors(tmp_path / "title.pkl")
    with pytest.raises(ValueError, match=r"title.npz: no such file"):
        read_vectors(tmp_path / "title.npz")
