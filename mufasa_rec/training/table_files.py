"""The exchange format of tables: safetensors and JSON, written by all ranks, read by rows.

    FOLDER/tables.json                          what is there: shapes, files with their rows, sizes and checksums
          /item/00000-of-00002.safetensors      tensor `embedding` [rows of this file, dim]
          /row_ids/item.safetensors             which id each row stands for
          /modules.safetensors                  data-parallel weights by name

Each rank writes its own share of rows in chunks. `tables.json` comes last: a folder without one is not complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mufasa_rec.data import paths
from mufasa_rec.data.matrices import Rows
from mufasa_rec.data.row_ids import RowIds
from mufasa_rec.data.row_reader import RowReader, safetensors_rows
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.training.checkpoint_manifest import FileFacts, file_facts

TABLES_FILE = "tables.json"
MODULES_FILE = "modules.safetensors"
TENSOR = "embedding"
_FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 22
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_tables(
    output: paths.Location,
    tables: Mapping[str, tuple[Rows, RowIds | None]],
    modules: Mapping[str, Tensor],
    about: dict[str, Any],
    exchange: RankExchange,
) -> None:
    """Write tables into a new folder, each rank its own share of every table's rows; collective.

    Args:
        output: The folder, local on storage that all ranks share, or a URL.
        tables: Table to its rows and what they stand for.
        modules: Data-parallel weights by name.
        about: Where all this comes from.
        exchange: Reaches the other ranks.

    Raises:
        ValueError: When the folder is there already.
        OSError: When a rank cannot write.
    """
    remote = paths.is_remote(output)
    target = str(output) if remote else str(paths.local_path(output).absolute())
    place = target if remote else f"{target.rpartition('/')[0]}/.{target.rpartition('/')[2]}.tmp"
    main = exchange.rank == 0
    on_all_ranks(exchange, lambda: _begin(target, place) if main else None)
    try:
        written = on_all_ranks(exchange, lambda: _write_share(place, tables, modules, exchange))
        parts = exchange.objects(written)
        manifest = _manifest(tables, parts, about)
        on_all_ranks(exchange, lambda: _finish(place, target, manifest) if main else None)
    finally:
        if main and not remote:
            paths.remove_folder(place)


def _begin(target: str, place: str) -> None:
    complete = paths.exists(paths.join(target, TABLES_FILE))
    if complete or (not paths.is_remote(target) and paths.exists(target)):
        raise ValueError(f"{target}: already exists; choose another folder, or remove that one.")
    paths.remove_folder(place)  # of an export that was interrupted
    if not paths.is_remote(place):
        paths.local_path(place).mkdir(parents=True)


def _finish(place: str, target: str, manifest: dict[str, Any]) -> None:
    with paths.atomic_write(paths.join(place, TABLES_FILE)) as path:
        path.write_text(json.dumps(manifest, indent=1))
    if place != target:
        paths.rename_folder(place, target.rpartition("/")[2])


def _write_share(
    place: str,
    tables: Mapping[str, tuple[Rows, RowIds | None]],
    modules: Mapping[str, Tensor],
    exchange: RankExchange,
) -> dict[str, dict[str, Any]]:
    """Write this rank's files; returns for each its size, checksum and, of tables, rows."""
    written: dict[str, dict[str, Any]] = {}
    for name, (rows, ids) in tables.items():
        first, stop = (rows.rows * (exchange.rank + part) // exchange.world_size for part in (0, 1))
        if first < stop:
            file = f"{name}/{exchange.rank:05d}-of-{exchange.world_size:05d}.safetensors"
            with paths.atomic_write(paths.join(place, file)) as path:
                _write_rows(path, rows, first, stop)
                written[file] = {"table": name, "first": first, "rows": stop - first, **asdict(file_facts(path))}
        if exchange.rank == 0 and ids is not None:
            file = ids.save(place, name)
            written[file] = {"ids": name, **asdict(file_facts(paths.join(place, file)))}
    if exchange.rank == 0 and modules:
        with paths.atomic_write(paths.join(place, MODULES_FILE)) as path:
            save_file({name: tensor.contiguous() for name, tensor in modules.items()}, path)
            written[MODULES_FILE] = {"modules": True, **asdict(file_facts(path))}
    return written


def _write_rows(path: Path, rows: Rows, first: int, stop: int) -> None:
    """Write rows `first` to `stop` as the one tensor of a safetensors file, a chunk in memory at a time."""
    size = rows.dim * rows.dtype.itemsize
    entry = {
        "dtype": _TYPES[rows.dtype],
        "shape": [stop - first, rows.dim],
        "data_offsets": [0, (stop - first) * size],
    }
    header = json.dumps({TENSOR: entry}).encode()
    header += b" " * (-len(header) % 8)
    chunk = max(_CHUNK_BYTES // size, 1)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(first, stop, chunk):
            found = rows.read(np.arange(start, min(start + chunk, stop)))
            file.write(found.view(torch.uint8).numpy().data)


def _manifest(
    tables: Mapping[str, tuple[Rows, RowIds | None]], parts: list[dict[str, dict[str, Any]]], about: dict[str, Any]
) -> dict[str, Any]:
    files = {file: facts for part in parts for file, facts in part.items()}
    shapes = {
        name: {"rows": rows.rows, "dim": rows.dim, "dtype": _TYPES[rows.dtype]} for name, (rows, _) in tables.items()
    }
    return {"format_version": _FORMAT_VERSION, "about": about, "tables": shapes, "files": files}


class ExportedTables:
    """Tables and modules of an exported folder; implements `mufasa_rec.training.table_sources.TableSource`.

    Args:
        folder: The folder, local or a URL.

    Raises:
        ValueError: When it is not complete, of another format version, or its manifest is damaged.
    """

    def __init__(self, folder: paths.Location) -> None:
        self.where = str(folder)
        file = paths.join(folder, TABLES_FILE)
        if not paths.exists(file):
            raise ValueError(f"{folder}: holds no complete export ({TABLES_FILE} is missing); export it again.")
        try:
            with paths.open_file(file) as handle:
                content = json.loads(handle.read())
            version = content["format_version"]
            self.about: dict[str, Any] = dict(content["about"])
            self._tables, self._files = content["tables"], content["files"]
            self.facts = {name: FileFacts(facts["bytes"], facts["xxh3_128"]) for name, facts in self._files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: damaged ({error!r}); export it again.") from error
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"{file}: format_version={version}, this version reads {_FORMAT_VERSION}; use the version of "
                "mufasa_rec that wrote it."
            )
        for name in self._files:
            if ".." in name.split("/") or name.startswith("/") or "\\" in name or ":" in name:
                raise ValueError(f"{file}: points at the file {name!r}, not at one of its folder.")

    def tables(self) -> list[str]:
        """Names of the tables."""
        return sorted(self._tables)

    def rows(self, table: str) -> RowReader:
        """Open a table's rows, reading the headers of its files only."""
        said, blocks = self._tables[table], []
        for file, facts in self._files.items():
            if facts.get("table") != table:
                continue
            block, dim, dtype = safetensors_rows(paths.join(self.where, file), TENSOR, facts["first"])
            if [block.rows, dim, _TYPES.get(dtype)] != [facts["rows"], said["dim"], said["dtype"]]:
                raise ValueError(
                    f"{self.where}/{file}: holds {block.rows} rows of {dim}, {TABLES_FILE} says {facts['rows']} of "
                    f"{said['dim']}; export it again."
                )
            blocks.append(block)
        dtype = next(kind for kind, name in _TYPES.items() if name == said["dtype"])
        reader = RowReader(f"{self.where}: table {table}", blocks, said["dim"], dtype)
        if reader.rows != said["rows"]:
            raise ValueError(f"{self.where}: files of table {table} are missing; export it again.")
        return reader

    def ids(self, table: str) -> RowIds | None:
        """What a table's rows stand for; None when that was not known."""
        file = next((file for file, facts in self._files.items() if facts.get("ids") == table), None)
        return None if file is None else RowIds.load(paths.join(self.where, file))

    def modules(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the data-parallel weights."""
        if MODULES_FILE not in self._files:
            return {}
        with self._open_modules() as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def module(self, name: str) -> Tensor:
        """One data-parallel weight."""
        with self._open_modules() as file:
            return file.get_tensor(name)

    def _open_modules(self) -> Any:
        file = paths.join(self.where, MODULES_FILE)
        try:
            return safe_open(paths.local_copy(file), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); export it again.") from error
