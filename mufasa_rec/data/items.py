"""The item store: what is known about each item beside its vectors, memory-mapped, one row per item, sorted by id.

Two files per immutable generation: ``items.safetensors`` (ids, availability, categoricals) and ``text.arrow`` (the
source's string id and the title). An item's row here is its row everywhere else: counts, ranking, coverage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import safe_open
from safetensors.numpy import save_file

from mufasa_rec.data import paths

ALWAYS_FROM = np.iinfo(np.int64).min
ALWAYS_TO = np.iinfo(np.int64).max
ITEMS_FILE = "items.safetensors"
TEXT_FILE = "text.arrow"


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """A categorical of items: one code per item, or a list of codes per item.

    Attributes:
        values: Codes, int32 `[n]` (0 = missing), or `[total]` when multi-valued.
        offsets: None, or int64 `[n + 1]`: item i has `values[offsets[i]:offsets[i + 1]]`.
        cardinality: Largest code.
    """

    values: np.ndarray
    offsets: np.ndarray | None
    cardinality: int


@dataclass(frozen=True, kw_only=True)
class ItemStore:
    """A read-only view of one generation; open it with ``ItemStore.open``."""

    ids: np.ndarray  # int64 [n], ascending
    available_from: np.ndarray  # int64 [n], milliseconds; ALWAYS_FROM when unknown
    available_to: np.ndarray  # int64 [n], milliseconds; ALWAYS_TO when unknown
    categoricals: dict[str, Categorical]
    text: pa.Table  # raw_id, title

    @classmethod
    def open(cls, dataset_url: paths.Location, generation: str) -> ItemStore:
        """Maps a generation into memory.

        Args:
            dataset_url: The data set.
            generation: Its name, from ``dataset.json``.
        """
        folder = paths.join(dataset_url, "items", generation)
        tensors, metadata = _map_tensors(paths.local_copy(paths.join(folder, ITEMS_FILE)))
        text = pa.ipc.open_file(pa.memory_map(str(paths.local_copy(paths.join(folder, TEXT_FILE))))).read_all()
        if text.num_rows != tensors["id"].size:
            raise ValueError(
                f"{folder}: {TEXT_FILE} has {text.num_rows} rows, {ITEMS_FILE} {tensors['id'].size}; prepare again"
            )
        cardinalities = json.loads(metadata["cardinalities"])
        categoricals = {name: _categorical(tensors, name, size) for name, size in sorted(cardinalities.items())}
        return cls(
            ids=tensors["id"],
            available_from=tensors["available_from"],
            available_to=tensors["available_to"],
            categoricals=categoricals,
            text=text,
        )

    def __len__(self) -> int:
        return int(self.ids.size)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Rows of raw ids.

        Args:
            ids: Raw ids or hashes, int64, any shape.

        Returns:
            Rows, int64, same shape; -1 for an id that is not in the store.
        """
        if not len(self):
            return np.full(np.shape(ids), -1, np.int64)
        first, last = int(self.ids[0]), int(self.ids[-1])
        if last - first + 1 == len(self):  # no gaps
            return np.where((ids >= first) & (ids <= last), ids - first, -1)
        rows = np.searchsorted(self.ids, ids)
        rows = np.minimum(rows, len(self) - 1)
        return np.where(self.ids[rows] == ids, rows, -1)

    def titles(self, rows: np.ndarray) -> list[str | None]:
        """Titles of rows `[k]`; None where there is none."""
        return self.text.column("title").take(pa.array(np.asarray(rows))).to_pylist()

    def raw_ids(self, rows: np.ndarray) -> list[int | str]:
        """Ids of rows `[k]` as the source wrote them: the string where there was one, else the integer."""
        strings = self.text.column("raw_id").take(pa.array(np.asarray(rows))).to_pylist()
        numbers = self.ids[np.asarray(rows)].tolist()
        return [number if string is None else string for string, number in zip(strings, numbers, strict=True)]


def _map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors of a safetensors file over mapped memory (torch's loader maps without a copy), and its metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).numpy() for name in list(file.keys())}
        metadata = dict(file.metadata() or {})
    return tensors, metadata


def _categorical(tensors: Mapping[str, np.ndarray], name: str, cardinality: int) -> Categorical:
    if f"cat.{name}.offsets" in tensors:
        return Categorical(
            values=tensors[f"cat.{name}.values"], offsets=tensors[f"cat.{name}.offsets"], cardinality=cardinality
        )
    return Categorical(values=tensors[f"cat.{name}"], offsets=None, cardinality=cardinality)


def write_item_store(
    folder: paths.Location,
    generation: str,
    *,
    ids: np.ndarray,
    raw_ids: pa.Array | None = None,
    titles: pa.Array | None = None,
    categoricals: Mapping[str, Categorical] | None = None,
    available_from: np.ndarray | None = None,
    available_to: np.ndarray | None = None,
) -> str:
    """Writes one generation of the item store under ``folder`` (a data set).

    Args:
        folder: The data set.
        generation: Name of the new generation.
        ids: Ids or hashes, int64 `[n]`, strictly ascending.
        raw_ids: The source's string ids `[n]`, or None for integer ids.
        titles: Strings `[n]`, nulls allowed.
        categoricals: Coded categoricals, row-aligned with ``ids``.
        available_from: int64 `[n]` milliseconds UTC.
        available_to: int64 `[n]` milliseconds UTC.

    Returns:
        Checksum of the generation (sha256 over both files).

    Raises:
        ValueError: Ids are not strictly ascending, or a column has another length.
    """
    n = ids.size
    if n > 1 and not (ids[1:] > ids[:-1]).all():
        raise ValueError("item store: ids must be strictly ascending; sort them and drop duplicates")
    tensors = {
        "id": np.ascontiguousarray(ids, np.int64),
        "available_from": np.full(n, ALWAYS_FROM) if available_from is None else available_from.astype(np.int64),
        "available_to": np.full(n, ALWAYS_TO) if available_to is None else available_to.astype(np.int64),
    }
    for name, column in (categoricals or {}).items():
        if column.offsets is None:
            tensors[f"cat.{name}"] = np.ascontiguousarray(column.values, np.int32)
        else:
            tensors[f"cat.{name}.values"] = np.ascontiguousarray(column.values, np.int32)
            tensors[f"cat.{name}.offsets"] = np.ascontiguousarray(column.offsets, np.int64)
        rows = column.values.size if column.offsets is None else column.offsets.size - 1
        if rows != n:
            raise ValueError(f"item store: categorical {name!r} has {rows} rows for {n} items")
    cardinalities = {name: column.cardinality for name, column in sorted((categoricals or {}).items())}
    # One key: safetensors writes several in a random order, and equal stores should have equal bytes.
    metadata = {"cardinalities": json.dumps(cardinalities)}
    return _write(paths.join(folder, "items", generation), tensors, metadata, _text_table(n, raw_ids, titles))


def _text_table(n: int, raw_ids: pa.Array | None, titles: pa.Array | None) -> pa.Table:
    columns = {"raw_id": raw_ids, "title": titles}
    return pa.table({key: pa.nulls(n, pa.string()) if c is None else c.cast(pa.string()) for key, c in columns.items()})


def _write(place: str, tensors: dict[str, np.ndarray], metadata: dict[str, str], text: pa.Table) -> str:
    digest = hashlib.sha256()
    with paths.atomic_write(paths.join(place, ITEMS_FILE)) as path:
        save_file(tensors, path, metadata=metadata)
        digest.update(path.read_bytes())
    with paths.atomic_write(paths.join(place, TEXT_FILE)) as path:
        with pa.ipc.new_file(str(path), text.schema) as writer:
            writer.write_table(text)
        digest.update(path.read_bytes())
    return digest.hexdigest()
