"""Starting a run from what others learned: tables and modules by name from a run or an export, matrices from files.

Rows are matched by what they stand for: item ids, values of a categorical. Each rank reads the rows of its own shards
and nothing else. Everything is checked on all ranks before a weight changes. Optimizer state is not taken: it is new.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mufasa_rec.data import paths
from mufasa_rec.data.row_ids import RowIds
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.table_rows import TableShard, belongs_to_ids, is_table, local_shards
from mufasa_rec.training.table_sources import TableSource, open_source
from mufasa_rec.training.warm_start_plan import TableCopy, WarmStartConfig, plan

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 22


def warm_start(
    model: nn.Module,
    config: WarmStartConfig,
    ids: Mapping[str, RowIds],
    exchange: RankExchange,
    *,
    split: str | None = None,
    checkpoints: paths.Location | None = None,
) -> dict[str, int]:
    """Fill a sharded model's tables and modules from elsewhere; collective.

    Args:
        model: The sharded model with its initial weights, which whatever is not taken keeps.
        config: What to take.
        ids: What the rows of this model's tables stand for, by table.
        exchange: Reaches the other ranks.
        split: Split that this model is trained on, as `<id>@<hash>`.
        checkpoints: Where the source run's checkpoints lie; in its folder when None.

    Returns:
        Bytes of rows that this rank read, by table.

    Raises:
        ValueError: When something does not fit, with everything that does not, on all ranks and with nothing changed;
            or when rows turn out to hold NaN or infinite values.
    """
    source = None
    if config.source:
        source = open_source(config.source, exchange, checkpoint=config.checkpoint, checkpoints=checkpoints)
        _check_split(source, split, config.allow_other_split)
    shards, shapes, weights = local_shards(model), _shapes(model), _modules(model)
    copies, modules = on_all_ranks(exchange, lambda: plan(config, ids, shapes, weights, source))
    if exchange.rank == 0:
        for copy in copies:
            logger.info("%s", copy.summary)
        if source is not None:
            logger.info("%d data-parallel weights taken from %s", len(modules), source.where)

    def fill() -> None:
        for copy in copies:
            for shard in shards.get(ids[copy.table].parameter, ()):
                _copy_rows(copy, shard)
        if source is not None:
            _copy_modules(weights, modules, source)

    on_all_ranks(exchange, fill)
    return {copy.table: copy.source.bytes_read for copy in copies}


def _check_split(source: TableSource, split: str | None, allowed: bool) -> None:
    """Refuse what may have been learned from events that are targets of this run's evaluation."""
    theirs = source.about.get("split")
    if not allowed and theirs is not None and split is not None and theirs != split:
        raise ValueError(
            f"warm_start.source={source.where}: was trained on split {theirs}, this run is on {split}: it may have "
            "seen events that this run is evaluated on. Take a source of the same split; where its events all lie "
            "before this split's targets, set warm_start.allow_other_split."
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows and dim of every sharded table, by parameter; known on every rank."""
    return {
        name.removesuffix(".weight").rsplit(".", 1)[-1]: (value.size()[0], value.size()[1])
        for name, value in model.state_dict().items()
        if is_table(name, value)
    }


def _modules(model: nn.Module) -> dict[str, Tensor]:
    """The data-parallel weights of a sharded model; they are the model's own memory."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not is_table(name, value) and not belongs_to_ids(name)
    }


@torch.no_grad()
def _copy_rows(copy: TableCopy, shard: TableShard) -> None:
    """Fill a shard of this rank: its rows in the order in which they lie in the source, a chunk at a time."""
    weight, first, column, _ = shard
    mine = np.flatnonzero((copy.rows >= first) & (copy.rows < first + len(weight)))
    mine = mine[np.argsort(copy.places[mine], kind="stable")]
    chunk = max(_CHUNK_BYTES // (copy.source.dim * copy.source.dtype.itemsize), 1)
    for start in range(0, len(mine), chunk):
        part = mine[start : start + chunk]
        found = copy.source.read(copy.places[part])
        if not torch.isfinite(found).all():
            bad = int((~torch.isfinite(found).all(1)).sum())
            raise ValueError(
                f"table {copy.table}: {bad} of {len(found)} rows read from {copy.source.name} hold NaN or infinite "
                "values; repair or leave them out."
            )
        columns = found[:, column : column + weight.shape[1]]
        weight[torch.from_numpy(copy.rows[part] - first).to(weight.device)] = columns.to(weight)


@torch.no_grad()
def _copy_modules(mine: Mapping[str, Tensor], names: Mapping[str, str], source: TableSource) -> None:
    for name, other in names.items():
        mine[name].copy_(source.module(other))
