"""The files of a source: which is which in a folder, how a table is read, and a fingerprint of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from mufasa_rec.data import paths
from mufasa_rec.data.importers.columns import COLUMNS_FILE
from mufasa_rec.data.importers.values import is_list

TABLES = (".parquet", ".csv", ".tsv")
VECTORS = (".npz", ".npy", ".safetensors")
IMPRESSIONS_NAMES = ("impressions",)
_WHOLE_BYTES = 1 << 30
_ID_NAMES = ("item_id", "id", "item", "ids")
_NULLS = ["", "NULL", "null", "NaN", "nan"]


@dataclass(kw_only=True)
class SourceFiles:
    """What a source consists of."""

    events: list[str]
    items: str | None = None
    impressions: list[str] = field(default_factory=list)
    vectors: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def all_files(self) -> list[str]:
        """Every file that decides the result, ids of ``.npy`` vectors included."""
        ids = [f"{url.removesuffix('.npy')}.ids.npy" for url in self.vectors.values() if url.endswith(".npy")]
        items = [self.items] if self.items else []
        return [*self.events, *self.impressions, *items, *self.vectors.values(), *filter(paths.exists, ids)]


def _stem(url: str) -> str:
    return PurePosixPath(url).name.split(".")[0]


def find_files(folder: str, events_names: Sequence[str], items_names: Sequence[str]) -> SourceFiles:
    """Sorts the files of a folder into events, items, vectors and the rest.

    Args:
        folder: Folder or URL.
        events_names: Stems of the events file, preferred first; a folder of that name with Parquet or CSV parts also
            does.
        items_names: Stems of the items file.

    Raises:
        ValueError: There is neither an events nor an impressions file, or two files for one thing.
    """
    files = paths.list_files(folder)
    tables = {url for url in files if url.endswith(TABLES)}
    events = _one_table(tables, events_names, folder)
    parts = [events] if events else _parts(folder, events_names)
    shown = _one_table(tables, IMPRESSIONS_NAMES, folder)
    impressions = [shown] if shown else _parts(folder, IMPRESSIONS_NAMES)
    if not parts and not impressions:
        have = ", ".join(PurePosixPath(url).name for url in files) or "nothing"
        raise ValueError(
            f"{folder}: no events file; there must be {' or '.join(f'{name}.parquet/.csv' for name in events_names)}, "
            f"or give the file itself as --input; the folder has {have}"
        )
    found = SourceFiles(events=parts, items=_one_table(tables, items_names, folder), impressions=impressions)
    for url in files:
        name = PurePosixPath(url).name
        if url in (*found.events, *found.impressions, found.items) or name == COLUMNS_FILE or name.endswith(".ids.npy"):
            continue
        if url.endswith(VECTORS) or (url.endswith(".parquet") and _holds_vectors(url)):
            modality = PurePosixPath(url).stem
            if modality in found.vectors:
                raise ValueError(f"{folder}: two vector files for modality {modality!r}; keep one of them")
            found.vectors[modality] = url
        else:
            found.ignored[name] = "neither events, items nor vectors"
    return found


def _one_table(tables: set[str], names: Sequence[str], folder: str) -> str | None:
    for name in names:
        match = sorted(url for url in tables if _stem(url) == name)
        if len(match) > 1:
            raise ValueError(
                f"{folder}: {' and '.join(PurePosixPath(m).name for m in match)} hold the same thing; keep one"
            )
        if match:
            return match[0]
    return None


def _parts(folder: str, names: Sequence[str]) -> list[str]:
    """Part files of a folder ``<name>/`` as Spark writes them."""
    for name in names:
        parts = [url for url in paths.list_files(paths.join(folder, name)) if url.endswith(TABLES)]
        if parts:
            return parts
    return []


def _holds_vectors(url: str) -> bool:
    schema = pq.read_schema(paths.local_copy(url))
    has_list = any(is_list(kind) and pa.types.is_floating(kind.value_type) for kind in schema.types)
    return has_list and any(name in schema.names for name in _ID_NAMES)


def table_schema(url: str) -> pa.Schema:
    """Column names and types of a table file; of a CSV, as its first block shows them."""
    path = paths.local_copy(url)
    try:
        if url.endswith(".parquet"):
            return pq.read_schema(path)
        with pc_csv.open_csv(path, parse_options=_parse_options(url), convert_options=_convert_options()) as reader:
            return reader.schema
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(url, error) from error


def read_table(url: str, columns: Sequence[str]) -> pa.Table:
    """Reads some columns of a Parquet, CSV or TSV file.

    Raises:
        ValueError: The file is empty, damaged or has no rows; names it.
    """
    path = paths.local_copy(url)
    columns = list(dict.fromkeys(columns))
    try:
        if url.endswith(".parquet"):
            # ParquetFile, not read_table: the latter takes folder names such as day=3 for columns.
            table = pq.ParquetFile(path).read(columns=columns)
        else:
            options = _convert_options()
            options.include_columns = columns
            table = pc_csv.read_csv(path, parse_options=_parse_options(url), convert_options=options)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(url, error) from error
    if not table.num_rows:
        raise ValueError(f"{url}: the file is empty (a header and no rows); give one with data")
    return table


def _unreadable(url: str, error: Exception) -> ValueError:
    path = paths.local_copy(url)
    if path.stat().st_size == 0 or "Empty CSV" in str(error):
        return ValueError(f"{url}: the file is empty; give one with data")
    kind = "Parquet" if url.endswith(".parquet") else "CSV with a header line"
    return ValueError(f"{url}: cannot be read as {kind} ({error}); write it again")


def _parse_options(url: str) -> pc_csv.ParseOptions:
    return pc_csv.ParseOptions(delimiter="\t" if url.endswith(".tsv") else ",", newlines_in_values=True)


def _convert_options() -> pc_csv.ConvertOptions:
    return pc_csv.ConvertOptions(null_values=_NULLS, strings_can_be_null=True)


def fingerprint(urls: Sequence[str]) -> str:
    """A hash of the files' names and content (of files beyond 1 GiB: size and first GiB)."""
    digest = hashlib.sha256()
    for url in sorted(urls):
        path = paths.local_copy(url)
        digest.update(f"{PurePosixPath(url).name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            left = _WHOLE_BYTES
            while left > 0 and (block := file.read(min(left, 1 << 22))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()
