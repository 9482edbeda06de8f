"""``--layout rows``: rows that Spark or a warehouse split and grouped become a data set without being rewritten.

The input has ``train/``, ``validation/`` and ``test/`` with Parquet files, each row one user's stream in list columns
by the names and types of the table contract, and beside them ``items.*`` and vector files as in the tabular layout.
The row files are copied byte for byte; item store, counts, hashes and manifests are made around them.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mufasa_rec.data import paths, raw
from mufasa_rec.data.catalog import Catalog, build_catalog
from mufasa_rec.data.check import check_dataset
from mufasa_rec.data.coding import Vocabulary
from mufasa_rec.data.event_files import PARTITION, bucket_file, file_hash
from mufasa_rec.data.events import EventLog
from mufasa_rec.data.importers.columns import merge_columns
from mufasa_rec.data.importers.files import find_files, fingerprint
from mufasa_rec.data.importers.tabular import ITEMS_NAMES, read_items
from mufasa_rec.data.importers.values import flat, is_list, is_text
from mufasa_rec.data.preparation import Preparation, write_counts
from mufasa_rec.data.raw import RawData
from mufasa_rec.data.schema import PARTS, DatasetManifest, PartInfo, SplitManifest
from mufasa_rec.data.split_hash import split_hash

SPLIT = "external"
_TARGET_FROM = "target_from"


class RowsPreparation(Preparation):
    """Rank 0's part, for rows with their own lists."""

    def _read(self) -> RawData:
        """Items and vectors; the rows are read by ``_build``."""
        config = self.config
        columns = merge_columns(config.columns, config.input, config.columns_file)
        files = find_files(config.input, ["train"], ITEMS_NAMES)
        self.files = {part: paths.list_files(paths.join(config.input, part), ".parquet") for part in PARTS}
        for part, found in self.files.items():
            if not found:
                raise ValueError(
                    f"{config.input}/{part}: no Parquet files; --layout rows needs train, validation and test"
                )
        url = config.items or files.items
        items = read_items(url, columns) if url else None
        rows = [url for found in self.files.values() for url in found]
        vectors: dict[str, str | tuple[np.ndarray, np.ndarray]] = {**files.vectors, **config.vectors}
        return RawData(
            name=PurePosixPath(config.input).name,
            events=pa.table({raw.USER: pa.array([], pa.int64()), raw.ITEM: pa.array([], pa.int64())}),
            items=items.table if items else None,
            vectors=vectors,
            choices=items.found.choices if items else [],
            ignored=files.ignored,
            fingerprint=fingerprint([*rows, *([url] if url else []), *files.vectors.values()]),
        )

    def _build(self) -> None:
        tables = {part: self._read_part(part) for part in PARTS}
        names = tables["train"].column_names
        lists = {name: tables["train"][name] for name in names if name not in (raw.USER, _TARGET_FROM)}
        offsets = np.r_[0, np.cumsum(_lengths(tables["train"]))]
        columns = {name: _values(column) for name, column in lists.items()}
        self.log = EventLog(
            users=flat(tables["train"][raw.USER]).to_numpy(zero_copy_only=False),
            offsets=offsets,
            item=columns.pop(raw.ITEM),
            timestamp=columns.pop(raw.TIMESTAMP, None),
            columns=columns,
            vocabularies={
                # Codes come as they are: code k stands for itself.
                name: Vocabulary(feature=name, values=list(range(1, int(values.max(initial=0)) + 1)))
                for name, values in columns.items()
                if name not in (raw.WEIGHT, raw.LABEL)
            },
        )
        items = np.unique(np.concatenate([_values(table[raw.ITEM]) for table in tables.values()]))
        self.catalog = self._catalog(items)
        self.parts: dict[str, PartInfo] = {}
        counts = {part: self._count(part, table) for part, table in tables.items()}
        self.training_counts, self.test_counts = counts["train"], counts["test"]

    def _read_part(self, part: str) -> pa.Table:
        """All rows of a part; column names must be those of the training rows."""
        table = pa.concat_tables([pq.ParquetFile(paths.local_copy(url)).read() for url in self.files[part]])
        where = f"{self.config.input}/{part}"
        for name in (raw.USER, raw.ITEM):
            if name not in table.column_names:
                raise ValueError(f"{where}: column {name!r} is missing; rows need user int64 and item list<int64>")
        for name in table.column_names:
            if name not in (raw.USER, _TARGET_FROM) and not is_list(table.schema.field(name).type):
                raise ValueError(f"{where}: column {name!r} is no list; write one value per event, or leave it out")
        return table

    def _catalog(self, items: np.ndarray) -> Catalog:
        table = self.raw.items
        if table is None or not is_text(table[raw.ITEM_ID].type):
            return build_catalog(table, pa.array(items), "refuse" if self.config.unknown_items == "drop" else "add")
        catalog = build_catalog(table, table[raw.ITEM_ID].combine_chunks()[:0], "add")
        unknown = items[~np.isin(items, catalog.ids)]
        if unknown.size:
            raise ValueError(
                f"rows: {unknown.size:,} items are not in the items file (first: {unknown[0]}); "
                "rows hold xxhash64 of the "
                "text ids of the items file"
            )
        return catalog

    def _count(self, part: str, table: pa.Table) -> np.ndarray:
        """Counts rows and targets of a part; returns its targets per item (and for training also each first input)."""
        lengths = _lengths(table)
        start = np.ones(lengths.size, np.int64)
        if _TARGET_FROM in table.column_names:
            start = flat(table[_TARGET_FROM]).to_numpy(zero_copy_only=False).astype(np.int64)
        self.parts[part] = PartInfo(rows=int(lengths.size), targets=int((lengths - start).sum()))
        if part == "train":
            start = np.where(start == 1, 0, start)
        place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        chosen = _values(table[raw.ITEM])[place >= np.repeat(start, lengths)]
        return np.bincount(np.searchsorted(self.catalog.ids, chosen), minlength=self.catalog.ids.size)

    @property
    def buckets(self) -> int:
        """Files per part, at most."""
        return max(len(found) for found in self.files.values())

    def write_events(self) -> None:
        """Copies the row files and writes split manifest, counts and vocabularies."""
        place = self.folder / "splits" / SPLIT
        files: dict[str, str] = {}
        for part, urls in self.files.items():
            for number, url in enumerate(urls):
                target = place / part / PARTITION / bucket_file(number)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(paths.local_copy(url), target)
                files[target.relative_to(place).as_posix()] = file_hash(target)
        for vocabulary in self.log.vocabularies.values():
            vocabulary.save(str(self.folder))
        manifest = SplitManifest(
            id=SPLIT,
            policy="external",
            hash=split_hash("external", {}, "", files),
            events_hash="",
            parts=self.parts,
            files=files,
        )
        manifest.save(str(self.folder))
        write_counts(self.folder, manifest, self.training_counts)
        self.manifests[SPLIT] = manifest

    def _manifest(self, content: dict) -> DatasetManifest:  # type: ignore[type-arg]
        """The manifest; what it says is held against the files before the data set gets its name."""
        manifest = super()._manifest(content)
        refs = {name: dataclasses.replace(ref, layout="lists") for name, ref in manifest.splits.items()}
        manifest = dataclasses.replace(manifest, splits=refs, tie_rule="as the rows were written")
        manifest.save(str(self.folder))
        problems = check_dataset(str(self.folder))
        if problems:
            first = "; ".join(f"{problem.file}: {problem.message}" for problem in problems[:3])
            raise ValueError(f"{self.config.input}: {len(problems)} problem(s) with the rows: {first}")
        return manifest


def _lengths(table: pa.Table) -> np.ndarray:
    column = flat(table[raw.ITEM])
    return np.diff(column.offsets.to_numpy(zero_copy_only=False)).astype(np.int64)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    return flat(column).flatten().to_numpy(zero_copy_only=False)
