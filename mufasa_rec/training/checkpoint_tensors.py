"""Tensors of a saved checkpoint by name, without a model and in one process: of a table only the rows that are wanted.

Torch's own way reads a whole saved shard to get at one row of it. Torch can however tell where in its file the data of
a tensor begins, by loading it onto fake tensors, and from there on rows are a matter of seeking.
"""

from __future__ import annotations

import io
import pickle
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from mufasa_rec.data import paths
from mufasa_rec.data.row_reader import RowBlock, RowReader
from mufasa_rec.training.checkpoint_reader import METADATA_FILE, read_metadata


class CheckpointTensors:
    """The tensors of a checkpoint by name, read in part, in one process, without a model.

    Args:
        folder: The checkpoint.

    Attributes:
        folder: As given.
        metadata: What the checkpoint says about itself.

    Raises:
        ValueError: When the metadata cannot be trusted or read.
    """

    def __init__(self, folder: paths.Location) -> None:
        self.folder = str(folder)
        self.metadata = read_metadata(paths.join(folder, METADATA_FILE))

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that begin with `prefix`, sorted."""
        return sorted(name for name in self.metadata.state_dict_metadata if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's values."""
        return self._entry(name).properties.dtype

    def rows(self, name: str) -> RowReader:
        """Open a table `[n, dim]`: where its saved shards lie is looked up, and nothing is read before it is asked for.

        Raises:
            ValueError: When it is not there, is no matrix, or its shards are not whole rows.
        """
        entry = self._entry(name)
        where = f"{self.folder}: {name}"
        if len(entry.size) != 2:
            raise ValueError(f"{where} has shape {tuple(entry.size)}; a table has two dimensions.")
        blocks = []
        for chunk in entry.chunks:
            if chunk.sizes[1] != entry.size[1]:
                raise ValueError(
                    f"{where}: its shards hold parts of rows; save it with row-wise or table-wise sharding."
                )
            if not chunk.sizes[0]:
                continue
            file, offset = self._start(name, chunk, entry.properties.dtype)
            blocks.append(RowBlock(file=file, offset=offset, first=chunk.offsets[0], rows=chunk.sizes[0]))
        reader = RowReader(where, blocks, entry.size[1], entry.properties.dtype)
        if reader.rows != entry.size[0]:
            raise ValueError(f"{where}: {reader.rows} of its {entry.size[0]} rows were saved; use another checkpoint.")
        return reader

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor of any shape, as data-parallel weights are saved."""
        entry = self._entry(name)
        if len(entry.chunks) != 1:
            raise ValueError(f"{self.folder}: {name} was saved in shards; read it by rows.")
        start = self._start(name, entry.chunks[0], entry.properties.dtype)
        block = RowBlock(file=start[0], offset=start[1], first=0, rows=entry.size.numel())
        reader = RowReader(f"{self.folder}: {name}", [block], 1, entry.properties.dtype)
        return reader.read(np.arange(reader.rows)).reshape(entry.size)

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{self.folder}: has no tensor {name!r}.")
        return entry

    def _start(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> tuple[str, int]:
        """File and place of a saved shard: torch tells it when it loads onto fake tensors, which reads no data."""
        place = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        file = paths.join(self.folder, place.relative_path)
        try:
            with paths.open_file(file) as handle, FakeTensorMode():
                section = _Section(handle, place.offset, place.length)
                saved = torch.load(cast(IO[bytes], section), map_location="cpu", weights_only=True)
                shape, offset, whole = tuple(saved.shape), saved.storage_offset(), saved.is_contiguous()
                where = saved.untyped_storage()._checkpoint_offset
        except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{file}: holds no readable tensor for {name} ({error}); use another checkpoint."
            ) from error
        if shape != tuple(chunk.sizes) or saved.dtype != dtype or not whole or where is None:
            raise ValueError(
                f"{file}: holds {saved.dtype} {shape} for {name}, its metadata says {dtype} {tuple(chunk.sizes)}; "
                "use another checkpoint."
            )
        return file, place.offset + where + offset * dtype.itemsize


def read_rows(folder: paths.Location, name: str, rows: np.ndarray) -> Tensor:
    """Read some rows of a saved table.

    Args:
        folder: The checkpoint.
        name: Name of the table in it, such as `model.sparse.ids.embeddings.t_item.weight`.
        rows: Ascending row numbers, int64 `[n]`, with any gaps.

    Returns:
        The rows, `[n, dim]`; shards without any of them are not touched.
    """
    return CheckpointTensors(folder).rows(name).read(rows)


class _Section(io.RawIOBase):
    """A part of an open file that looks like a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")
        self._file.seek(self._start + self._at)
        data = self._file.read(max(min(len(memory), self._length - self._at), 0))
        memory[: len(data)] = data
        self._at += len(data)
        return len(data)
