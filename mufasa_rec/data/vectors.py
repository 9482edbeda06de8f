"""Readers of vector files: ids and precomputed vectors from `.npy`, `.npz`, Parquet or safetensors.

A reader hands out the ids at once (8 bytes a row) and the vectors as something that can be sliced, so that a file
larger than memory passes through in chunks: arrays are memory-mapped, Parquet is streamed. Nothing here unpickles.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib import format as npy_format
from safetensors import SafetensorError, safe_open

from mufasa_rec.data import paths
from mufasa_rec.data.ids import hash_ids

ID_NAMES = ("item_id", "id", "item", "ids")
VECTOR_NAMES = ("vector", "vectors", "embedding", "embeddings")
_BATCH_ROWS = 8192


class VectorSource(Protocol):
    """Vectors that can be sliced by rows: an array, a memory map, or a stream that reads forward."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width, `(n, P)`."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """The rows of a slice, `[rows, P]`."""
        ...


def read_vectors(url: str | Path, *, item_ids: np.ndarray | None = None) -> tuple[np.ndarray, VectorSource]:
    """Opens a vector file of any supported format.

    `.npz` and safetensors hold an id array (`item_id`, `id`, `item` or `ids`) and a vector array (`vector`, `vectors`,
    `embedding` or `embeddings`); Parquet holds columns of these names, the vectors as a list column. A `.npy` file has
    its ids in `<stem>.ids.npy` beside it, or its rows are in the order of ``item_ids``. String ids are hashed.

    Args:
        url: The file, local or remote.
        item_ids: Ids of the items in the order of the rows of a `.npy` file that has no ids of its own, `[n]`.

    Returns:
        Ids, int64 `[n]`, and the vectors, sliceable by rows, `[n, P]`.

    Raises:
        ValueError: The format is unknown, an array is missing or malformed, or ids and vectors differ in number.
    """
    readers = {".npz": _read_npz, ".parquet": _read_parquet, ".safetensors": _read_safetensors}
    suffix = PurePosixPath(str(url)).suffix.lower()
    if suffix == ".npy":
        ids, vectors = _read_npy(str(url), item_ids)
    elif suffix in readers:
        ids, vectors = readers[suffix](paths.local_copy(str(url)))
    else:
        known = ", ".join([".npy", *readers])
        raise ValueError(f"vector file {url}: format {suffix!r} is not known; convert it to one of {known}")
    if len(vectors.shape) != 2 or vectors.shape[1] == 0:
        raise ValueError(f"vector file {url}: vectors have shape {tuple(vectors.shape)}; give one row per item, [n, P]")
    if len(ids) != vectors.shape[0]:
        raise ValueError(
            f"vector file {url}: {len(ids)} ids but {vectors.shape[0]} vectors; give exactly one id for each vector"
        )
    return as_int64(ids, str(url)), vectors


def as_int64(ids: np.ndarray, url: str) -> np.ndarray:
    """Integer ids as int64, string ids by their hash."""
    if ids.ndim != 1:
        raise ValueError(f"vector file {url}: ids have shape {ids.shape}; give a one-dimensional array, [n]")
    if ids.dtype.kind == "S":
        ids = np.char.decode(ids, "utf-8")
    if ids.dtype.kind in "UT":
        return hash_ids(ids.tolist())
    if ids.dtype.kind not in "iu" or (ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max):
        raise ValueError(f"vector file {url}: ids of type {ids.dtype} are not ids; give int64 or strings")
    return ids.astype(np.int64)


def _load(path: Path) -> np.ndarray:
    """Maps a `.npy` file; arrays of Python objects would need pickle and are refused."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"vector file {path.name}: {error}; save a plain numeric array with numpy.save") from error


def _read_npy(url: str, item_ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    ids_url = url[: -len(".npy")] + ".ids.npy"
    if paths.exists(ids_url):
        return np.asarray(_load(paths.local_copy(ids_url))), _load(paths.local_copy(url))
    if item_ids is None:
        name = PurePosixPath(ids_url).name
        raise ValueError(
            f"vector file {url}: a .npy file holds no ids; put them beside it as {name} (int64 or strings)"
        )
    return item_ids, _load(paths.local_copy(url))


def _first(names: Sequence[str], wanted: Sequence[str], what: str, path: Path) -> str:
    """The first wanted name that is there."""
    for name in wanted:
        if name in names:
            return name
    raise ValueError(
        f"vector file {path.name}: no {what} array among {sorted(names)}; name it one of {', '.join(wanted)}"
    )


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            ids = _map_member(archive, _first(names, ID_NAMES, "id", path), path)
            return np.array(ids), _map_member(archive, _first(names, VECTOR_NAMES, "vector", path), path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"vector file {path.name}: not a readable .npz ({error}); save it with numpy.savez") from error


def _map_member(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """Inflates one array of an archive to an unnamed temporary file and maps that: memory stays flat."""
    with archive.open(f"{name}.npy") as member, tempfile.TemporaryFile() as file:
        shutil.copyfileobj(member, file, 1 << 20)
        file.seek(0)
        read_header = {
            (1, 0): npy_format.read_array_header_1_0,
            (2, 0): npy_format.read_array_header_2_0,
        }.get(npy_format.read_magic(file))
        if read_header is None:
            raise ValueError(f"vector file {path.name}: array {name!r} has an unusual header; save it with numpy.savez")
        shape, fortran_order, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(
                f"vector file {path.name}: array {name!r} holds Python objects; save numbers or fixed strings"
            )
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")


def _read_safetensors(path: Path) -> tuple[np.ndarray, VectorSource]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            ids = file.get_tensor(_first(names, ID_NAMES, "id", path))
            vectors = file.get_tensor(_first(names, VECTOR_NAMES, "vector", path))
    except SafetensorError as error:
        raise ValueError(
            f"vector file {path.name}: not a readable safetensors file ({error}); write it again"
        ) from error
    if vectors.dtype == torch.bfloat16:
        return ids.numpy(), _BFloat16Vectors(vectors)
    return ids.numpy(), vectors.numpy()


class _BFloat16Vectors:
    """A bfloat16 tensor whose slices come out as float32, since NumPy has no bfloat16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        return self._tensor[rows].float().numpy()


def _read_parquet(path: Path) -> tuple[np.ndarray, VectorSource]:
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"vector file {path.name}: not a readable Parquet file ({error}); write it again") from error
    id_name = _first(schema.names, ID_NAMES, "id", path)
    column = pq.read_table(path, columns=[id_name])[id_name]
    if column.null_count:
        raise ValueError(
            f"vector file {path.name}: column {id_name!r} holds {column.null_count} nulls; every vector needs an id"
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ids = hash_ids(column.to_pylist()) if is_text else column.to_numpy()
    return ids, _ParquetVectors(path, _first(schema.names, VECTOR_NAMES, "vector", path))


class _ParquetVectors:
    """A list column read as a stream: slices in ascending order cost one pass over the file."""

    def __init__(self, path: Path, column: str) -> None:
        self._path, self._column = path, column
        self._start, self._pending, self._batches = 0, np.empty((0, 0)), self._stream()
        first = next(self._stream(), np.empty((0, 0)))
        self.shape = (pq.read_metadata(path).num_rows, first.shape[1])

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        if start < self._start:
            self._start, self._pending, self._batches = 0, np.empty((0, 0)), self._stream()
        parts = []
        while stop > self._start + len(self._pending):
            if start < self._start + len(self._pending):
                parts.append(self._pending[max(start - self._start, 0) :])
            self._start += len(self._pending)
            self._pending = next(self._batches)
        parts.append(self._pending[max(start - self._start, 0) : max(stop - self._start, 0)])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _stream(self) -> Iterator[np.ndarray]:
        with pq.ParquetFile(self._path, pre_buffer=False) as file:
            width: int | None = None
            for batch in file.iter_batches(_BATCH_ROWS, columns=[self._column]):
                vectors = self._matrix(batch.column(0), width)
                width = vectors.shape[1]
                yield vectors

    def _matrix(self, lists: pa.Array, width: int | None) -> np.ndarray:
        """One batch of lists as a matrix; the lists must be as long as those before."""
        where = f"vector file {self._path.name}: column {self._column!r}"
        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(is_kind(lists.type) for is_kind in kinds) or not pa.types.is_floating(lists.type.value_type):
            raise ValueError(f"{where} has type {lists.type}; give a list of float16, float32 or float64")
        if lists.null_count:
            raise ValueError(f"{where} holds {lists.null_count} nulls; leave items without a vector out of the file")
        if pa.types.is_fixed_size_list(lists.type):
            width = lists.type.list_size
        else:
            lengths = np.diff(lists.offsets.to_numpy())
            width = int(lengths[0]) if width is None and len(lengths) else width
            if (lengths != width).any():
                other = int(lengths[lengths != width][0])
                raise ValueError(f"{where} holds lists of {width} and of {other} values; give all vectors one width")
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), width or 0)
