"""Rows of a matrix read straight from where they lie in files: nothing else is read, and the bytes are counted.

A matrix too large for one rank lies in one file or many, each with consecutive rows one after another: a `.npy` file, a
tensor of a safetensors file, a saved shard of a checkpoint. A rank that needs some rows seeks to them, so its cost in
time and memory is that of its own rows. Files are local or behind any URL that fsspec knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from mufasa_rec.data import paths

_MAX_HEADER_BYTES = 100 << 20  # as the safetensors library has it
_SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive rows of a matrix in one file.

    Attributes:
        file: Path or URL.
        offset: Where the first of them begins, in bytes.
        first: Its row in the matrix.
        rows: How many there are.
    """

    file: str
    offset: int
    first: int
    rows: int


class RowReader:
    """Reads rows of a matrix that lies in blocks.

    Args:
        name: What error messages call the matrix.
        blocks: The blocks that hold it; together every row once.
        dim: Values of a row.
        dtype: Their type.

    Attributes:
        rows: Rows of the matrix.
        bytes_read: Bytes of rows read so far.

    Raises:
        ValueError: When the blocks leave rows out or hold some twice.
    """

    def __init__(self, name: str, blocks: Sequence[RowBlock], dim: int, dtype: torch.dtype) -> None:
        self.name, self.dim, self.dtype = name, dim, dtype
        self.blocks = sorted((block for block in blocks if block.rows), key=lambda block: block.first)
        self.rows = 0
        for block in self.blocks:
            if block.first != self.rows:
                raise ValueError(
                    f"{name}: its files hold no block that begins at row {self.rows} but one at row {block.first}; "
                    "write it again."
                )
            self.rows += block.rows
        self.bytes_read = 0

    def read(self, rows: np.ndarray) -> Tensor:
        """Read some rows.

        Args:
            rows: Ascending row numbers, int64 `[n]`, with any gaps.

        Returns:
            The rows on the CPU, `[n, dim]`.

        Raises:
            ValueError: When a row is not in the matrix, or a file is shorter than it should be.
        """
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.rows or (np.diff(rows) < 0).any()):
            raise ValueError(
                f"{self.name}: rows {rows[0]} to {rows[-1]} asked for; give ascending rows of 0 to {self.rows - 1}."
            )
        found = torch.empty(len(rows), self.dim, dtype=self.dtype)
        if not found.numel():
            return found
        memory = found.view(torch.uint8).numpy().reshape(-1).data
        size = self.dim * found.element_size()
        for block in self.blocks:
            start, stop = np.searchsorted(rows, [block.first, block.first + block.rows])
            if start < stop:
                self._read_block(block, rows[start:stop], memory[start * size : stop * size], size)
        return found

    def _read_block(self, block: RowBlock, rows: np.ndarray, memory: memoryview, size: int) -> None:
        """Fill `memory` with rows of one block: a seek and a read for each run of neighbours."""
        starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
        with open_unbuffered(block.file) as file:
            for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
                file.seek(block.offset + (int(rows[start]) - block.first) * size)
                self._fill(file, memory[start * size : stop * size], block.file)

    def _fill(self, file: IO[bytes], memory: memoryview, name: str) -> None:
        while memory:
            count = file.readinto(memory)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{name}: ends in the middle of {self.name}; copy it again.")
            self.bytes_read += count
            memory = memory[count:]


def open_unbuffered(url: paths.Location) -> IO[bytes]:
    """Open a file so that a local one is read for exactly what is asked.

    Raises:
        ValueError: When it is not there.
    """
    if paths.is_remote(url):
        return paths.open_file(url)
    try:
        return open(paths.local_path(url), "rb", buffering=0)
    except FileNotFoundError as error:
        raise ValueError(f"{url}: no such file; check the path") from error


def safetensors_header(url: paths.Location) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file and nothing else.

    Returns:
        Tensor name to `{"dtype", "shape", "data_offsets"}`, and where the data begins.

    Raises:
        ValueError: When it is no such file.
    """
    try:
        with paths.open_file(url) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise ValueError("its header has no plausible length")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            size = math.prod(entry["shape"]) * _SAFETENSORS_TYPES[entry["dtype"]].itemsize
            if min(begin, *entry["shape"], 0) < 0 or end - begin != size:
                raise ValueError(f"tensor {name!r} has {end - begin} bytes for {entry['dtype']} {entry['shape']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url}: not a readable safetensors file ({error}); write it again.") from error
    return header, 8 + length


def safetensors_rows(url: paths.Location, tensor: str, first: int = 0) -> tuple[RowBlock, int, torch.dtype]:
    """Find the rows of a tensor `[n, dim]` of a safetensors file.

    Args:
        url: The file.
        tensor: Name of the tensor.
        first: Which row of the matrix its first row is.

    Returns:
        The block, dim and dtype.

    Raises:
        ValueError: When the tensor is not there or has another number of dimensions.
    """
    header, data = safetensors_header(url)
    if tensor not in header:
        raise ValueError(f"{url}: has no tensor {tensor!r}; there are {sorted(header)}.")
    entry = header[tensor]
    rows, dim = _two_dimensions(entry["shape"], f"{url}: tensor {tensor!r}")
    block = RowBlock(file=str(url), offset=data + entry["data_offsets"][0], first=first, rows=rows)
    return block, dim, _SAFETENSORS_TYPES[entry["dtype"]]


def npy_rows(url: paths.Location) -> RowReader:
    """Open a `.npy` file of a matrix `[n, dim]` without reading it.

    Raises:
        ValueError: When it is no such file, or holds something else than numbers by rows.
    """
    try:
        with paths.open_file(url) as file:
            readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
            shape, by_columns, dtype = readers[npy_format.read_magic(file)](file)
            offset = file.tell()
        if by_columns or dtype.kind not in "fiu" or not dtype.isnative:
            raise ValueError(f"{dtype} {'by columns' if by_columns else 'by rows'}")
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{url}: no .npy file of numbers by rows ({error}); save it by numpy.save(numpy.ascontiguousarray(...))."
        ) from error
    rows, dim = _two_dimensions(shape, str(url))
    return RowReader(str(url), [RowBlock(file=str(url), offset=offset, first=0, rows=rows)], dim, kind)


def _two_dimensions(shape: Sequence[int], where: str) -> tuple[int, int]:
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"{where} has shape {tuple(shape)}; give one row per id, [n, dim].")
    return int(shape[0]), int(shape[1])
