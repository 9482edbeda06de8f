"""The rows of sharded tables: which are here, their first weights, and those that are read from a store."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)
_BLOCK = 1 << 16  # rows that share one random stream


class TableShard(NamedTuple):
    """A part of a table that lies on this rank.

    Attributes:
        weight: Its weights, `[rows, columns]`, the table's own memory.
        first: Its first row in the table.
        column: Its first column in the table.
        dim: Columns of the whole table.
    """

    weight: Tensor
    first: int
    column: int
    dim: int


def local_shards(model: nn.Module) -> dict[str, list[TableShard]]:
    """This rank's parts of every sharded table, by table; nothing for a table without any."""
    found: dict[str, list[TableShard]] = {}
    for name, value in model.state_dict().items():
        if not is_table(name, value):
            continue
        for weight, (first, column) in _parts(value):
            parts = found.setdefault(name.removesuffix(".weight").rsplit(".", 1)[-1], [])
            parts.append(TableShard(weight, first, column, value.size()[1]))
    return found


def is_table(name: str, value: Any) -> bool:
    """Whether an entry of a state dict is a sharded table: a DTensor where groups of ranks hold copies.

    What belongs to the rows of a managed table is sharded too, under other names.
    """
    return name.endswith(".weight") and isinstance(value, (ShardedTensor, DTensor))


def belongs_to_ids(name: str) -> bool:
    """Whether an entry of a state dict says which ids the rows of a managed table belong to."""
    return "._managed_collision_modules." in name


def is_of_tables(name: str) -> bool:
    """Whether a name in a checkpoint is that of a table, or of what belongs to its rows."""
    return ".embeddings." in name or belongs_to_ids(name)


def _parts(value: Any) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """Local weights of a table's entry, each with its first row and column."""
    if isinstance(value, ShardedTensor):
        yield from ((part.tensor, part.metadata.shard_offsets) for part in value.local_shards())
    else:
        shards: Any = value.to_local()  # TorchRec's LocalShardsWrapper
        yield from zip(shards.local_shards(), shards.local_offsets())


@torch.no_grad()
def initialise_tables(model: nn.Module, std: Mapping[str, float], seed: int) -> None:
    """Draw the tables' initial weights from streams keyed by (seed, table, block of rows).

    So the same row starts with the same weights on any number of ranks and under any plan. Row 0 of a table, the row of
    unknown and rare values, starts at zero: a value that was never trained should say nothing.

    Args:
        model: The sharded model.
        std: Standard deviation of each table's weights; other tables are left alone.
        seed: Seed of the run.
    """
    for table, (weight, first, column, dim) in _shards(model, std):
        last = first + len(weight)
        for block in range(first // _BLOCK, -(-last // _BLOCK)):
            stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{table}/{block}".encode()))
            start, stop = max(block * _BLOCK, first), min((block + 1) * _BLOCK, last)
            drawn = torch.randn(stop - block * _BLOCK, dim, generator=stream) * std[table]
            mine = drawn[start - block * _BLOCK :, column : column + weight.shape[1]]
            weight[start - first : stop - first] = mine.to(weight)
        if first == 0 and len(weight):
            weight[0] = 0.0


@torch.no_grad()
def load_rows(model: nn.Module, readers: Mapping[str, Callable[[int, int], Tensor]], chunk_rows: int = _BLOCK) -> None:
    """Fill tables from stores, each rank reading only the rows of its own shards.

    Args:
        model: The sharded model.
        readers: Table to a function that returns its rows `start` to `stop`, `[stop - start, width]` with a width of
            at most the table's.
        chunk_rows: Rows read at once.
    """
    for table, (weight, first, column, _) in _shards(model, readers):
        for start in range(0, len(weight), chunk_rows):
            stop = min(start + chunk_rows, len(weight))
            rows = readers[table](first + start, first + stop)[:, column : column + weight.shape[1]]
            weight[start : start + len(rows), : rows.shape[1]] = rows.to(weight)
        logger.info("table %s: rows %d to %d read from its store", table, first, first + len(weight))


def _shards(model: nn.Module, tables: Mapping[str, object]) -> Iterator[tuple[str, TableShard]]:
    """This rank's shards of some tables."""
    for table, parts in local_shards(model).items():
        if table in tables:
            yield from ((table, part) for part in parts)
