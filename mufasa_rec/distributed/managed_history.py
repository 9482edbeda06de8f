"""What managed tables have seen since their last round, in a checkpoint: it decides who is admitted in the next one.

Each rank saves the keys that it was sent, under its own name; how many of them belong to each step is told beside the
tensors. On another number of ranks a rank reads the files of those that held its buckets, and keeps what is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mufasa_rec.distributed import id_keys
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.managed_collision import managed_ids

Facts = dict[str, list[list[int]]]  # ids seen in each step, by rank, by feature


def history(model: nn.Module, exchange: RankExchange) -> tuple[dict[str, Any], Facts]:
    """What has been seen since the last round, as a checkpoint holds it; collective.

    Args:
        model: The sharded model.
        exchange: Reaches the other ranks.

    Returns:
        Tensors, and what must be known to read them; both empty without managed tables.
    """
    tables = managed_ids(model)
    if not tables:
        return {}, {}
    gathered = exchange.objects({feature: [len(part) for part in table.pending] for feature, table in tables.items()})
    facts = {feature: [lengths[feature] for lengths in gathered] for feature in tables}
    tensors = {
        feature: {f"rank_{exchange.rank}": torch.cat(table.pending)}
        for feature, table in tables.items()
        if any(len(part) for part in table.pending)
    }
    return tensors, facts


def restore_history(model: nn.Module, facts: Facts, load: Callable[[dict[str, Any]], None]) -> None:
    """Stand where the tables stood when their buffers, which are read already, were saved.

    Args:
        model: The sharded model.
        facts: What `history` gave.
        load: Fills tensors, named as `history` named them.
    """
    tables = managed_ids(model)
    wanted: dict[str, dict[str, Tensor]] = {}
    for feature, table in tables.items():
        lengths = facts[feature]
        per_rank = table.config.buckets // len(lengths)
        first, last = table.first_bucket, table.first_bucket + table.num_buckets - 1
        for rank in range(first // per_rank, last // per_rank + 1):
            if sum(lengths[rank]):
                keys = torch.empty(sum(lengths[rank]), dtype=torch.int64, device=table.device)
                wanted.setdefault(feature, {})[f"rank_{rank}"] = keys
    load(wanted)  # collective: also with nothing
    for feature, table in tables.items():
        found = wanted.get(feature, {})
        parts = {rank: keys.split(facts[feature][int(rank.removeprefix("rank_"))]) for rank, keys in found.items()}
        steps = max((len(lengths) for lengths in facts[feature]), default=0)
        none = torch.zeros(0, dtype=torch.int64, device=table.device)
        table.loaded(
            [_own(table, torch.cat([none, *(part[step] for part in parts.values())])) for step in range(steps)]
        )


def _own(table: Any, keys: Tensor) -> Tensor:
    """Those keys whose buckets lie on this rank."""
    bucket = id_keys.bucket_of(keys, table.config.buckets) - table.first_bucket
    return keys[(bucket >= 0) & (bucket < table.num_buckets)]
