"""A user's own pre-trained matrix: rows of vectors with or without ids, of which every rank reads its own.

`.npy` and safetensors files are read by seeking to the rows. `.npz` is inflated to a temporary file, Parquet is read as
a stream up to the last row that is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mufasa_rec.data import paths
from mufasa_rec.data.row_reader import RowBlock, RowReader, npy_rows, safetensors_header, safetensors_rows
from mufasa_rec.data.vectors import ID_NAMES, VECTOR_NAMES, VectorSource, as_int64, read_vectors


class Rows(Protocol):
    """A matrix that can be read by rows; see `RowReader`."""

    name: str
    rows: int
    dim: int
    dtype: torch.dtype
    bytes_read: int

    def read(self, rows: np.ndarray) -> Tensor:
        """Read ascending rows `[n]`; returns `[n, dim]`."""
        ...


@dataclass(frozen=True)
class Matrix:
    """An opened matrix.

    Attributes:
        rows: Reads the vectors.
        ids: Id of each row, int64 `[n]`; None when the file has none.
    """

    rows: Rows
    ids: np.ndarray | None


def open_matrix(url: paths.Location) -> Matrix:
    """Open a matrix without reading its vectors.

    Names of arrays and columns are those of `read_vectors`; without ids there may be a single array of any name.

    Raises:
        ValueError: When the format is unknown, the vectors are not numbers by rows, or ids do not go with them.
    """
    url = str(url)
    suffix = PurePosixPath(url).suffix.lower()
    if suffix == ".npy":
        rows: Rows = npy_rows(url)
        ids = _npy_ids(url)
    elif suffix == ".safetensors":
        rows, ids = _open_safetensors(url)
    else:
        ids, vectors = read_vectors(url)
        rows = _SlicedRows(url, vectors)
    if not rows.dtype.is_floating_point:
        raise ValueError(f"{url}: holds {rows.dtype}; embeddings are float16, bfloat16, float32 or float64.")
    if ids is not None:
        ids = as_int64(ids, url)
        if len(ids) != rows.rows:
            raise ValueError(f"{url}: {len(ids)} ids but {rows.rows} vectors; give exactly one id for each vector.")
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{url}: {len(ids) - len(np.unique(ids))} ids appear twice; give each id once.")
    return Matrix(rows, ids)


def _npy_ids(url: str) -> np.ndarray | None:
    """Ids beside a `.npy` file, if they are there."""
    file = url[: -len(".npy")] + ".ids.npy"
    if not paths.exists(file):
        return None
    try:
        return np.load(paths.local_copy(file), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; save int64 or strings of a fixed width by numpy.save.") from error


def _open_safetensors(url: str) -> tuple[Rows, np.ndarray | None]:
    header, data = safetensors_header(url)
    matrices = [name for name, entry in header.items() if len(entry["shape"]) == 2]
    named = [name for name in VECTOR_NAMES if name in matrices]
    if not named and len(matrices) != 1:
        raise ValueError(f"{url}: which of {sorted(matrices)} are the vectors? Name them one of {VECTOR_NAMES}.")
    block, dim, dtype = safetensors_rows(url, (named or matrices)[0])
    rows = RowReader(url, [block], dim, dtype)
    name = next((name for name in ID_NAMES if name in header), None)
    if name is None:
        return rows, None
    entry = header[name]
    if entry["dtype"] not in ("I64", "I32") or len(entry["shape"]) != 1:
        raise ValueError(f"{url}: ids are {entry['dtype']} {entry['shape']}; give int64 `[n]`.")
    place = RowBlock(file=url, offset=data + entry["data_offsets"][0], first=0, rows=entry["shape"][0])
    kind = torch.int64 if entry["dtype"] == "I64" else torch.int32
    reader = RowReader(f"{url}: {name}", [place], 1, kind)
    return rows, reader.read(np.arange(reader.rows)).reshape(-1).numpy()


class _SlicedRows:
    """Rows of something that can only be sliced."""

    def __init__(self, name: str, vectors: VectorSource) -> None:
        self.name, self._vectors = name, vectors
        self.rows, self.dim = vectors.shape
        kind = vectors[0:1].dtype
        self.dtype = torch.from_numpy(np.empty(0, kind)).dtype
        self.bytes_read = 0

    def read(self, rows: np.ndarray) -> Tensor:
        """Read ascending rows `[n]`, a slice for each run of neighbours."""
        found = np.empty((len(rows), self.dim), dtype=torch.empty(0, dtype=self.dtype).numpy().dtype)
        if not len(rows):
            return torch.from_numpy(found)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            found[start:stop] = self._vectors[int(rows[start]) : int(rows[stop - 1]) + 1]
        self.bytes_read += found.nbytes
        return torch.from_numpy(found)
