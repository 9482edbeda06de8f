"""TorchRec's managed collision embedding collection, sharded: rows that get another id start anew.

TorchRec resets rows in place of which other ids were admitted with the operator `fbgemm::reset_weight_momentum`, which
has no CPU kernel, leaves the state of every optimizer but row-wise Adagrad, and draws weights from the collection's
`init_fn` with the process's random numbers. Here the weights are drawn from the run's own initial distribution, keyed
by (seed, table, bucket, step), and the state of any optimizer is set to zero, on any device, without that operator.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionSharder,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule

from mufasa_rec.distributed.id_policy import ManagedIdsConfig, Method
from mufasa_rec.distributed.managed_ids import ManagedIds
from mufasa_rec.distributed.multi_probe_ids import MultiProbeIds

AnyManagedIds = ManagedIds | MultiProbeIds
_KINDS: dict[Method, type[ManagedIds] | type[MultiProbeIds]] = {"sorted": ManagedIds, "multi_probe": MultiProbeIds}
INSIDE = "_embedding_module"  # TorchRec's name of the tables in a managed collection


def managed_collection(
    tables: list[EmbeddingConfig], configs: Mapping[str, ManagedIdsConfig], device: torch.device
) -> ManagedCollisionEmbeddingCollection:
    """Tables of one width whose rows are managed.

    Args:
        tables: The tables. A table's first feature holds ids that count, a second one ids that are only looked up.
        configs: Admission and eviction by first feature.
        device: Where the weights are made.
    """
    modules: dict[str, ManagedCollisionModule] = {}
    for table in tables:
        feature = table.feature_names[0]
        kind = _KINDS[configs[feature].method]
        modules[table.name] = kind(feature, table.num_embeddings, configs[feature], device)
    return ManagedCollisionEmbeddingCollection(
        EmbeddingCollection(tables=tables, device=device), ManagedCollisionCollection(modules, tables)
    )


def managed_ids(model: nn.Module) -> dict[str, AnyManagedIds]:
    """The parts of all managed tables that lie on this rank, by feature."""
    return {module.feature: module for module in model.modules() if isinstance(module, AnyManagedIds)}


class ShardedManagedCollection(ShardedManagedCollisionEmbeddingCollection):
    """A managed collection of which this rank holds whole buckets.

    Attributes:
        seed: Seed of the weights of rows that get another id.
        std: Their standard deviation, by table.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.seed = 0
        self.std: dict[str, float] = {}
        self._place = {name: (kernel, int(index)) for name, (kernel, index) in self._table_to_tbe_and_index.items()}

    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        for table, rows in evictions_per_table.items():
            if rows is not None:
                self._reset(table, rows)

    @torch.no_grad()
    def _reset(self, table: str, rows: Tensor) -> None:
        """Start rows `[n]` of this rank's part anew; they are given by bucket."""
        kernel, index = self._place[table]
        weights = kernel.split_embedding_weights()[index]
        ids = self._managed_collision_collection._managed_collision_modules[table]
        assert isinstance(ids, AnyManagedIds)
        weights[rows] = self._drawn(table, ids, rows, weights.shape[1]).to(weights)
        states = kernel.split_optimizer_states()  # none at all for plain gradient descent
        for state in states[index] if states else ():
            if state.numel() and state.numel() % len(weights) == 0:  # a number per row, or per weight
                state.view(len(weights), -1)[rows] = 0

    def _drawn(self, table: str, ids: AnyManagedIds, rows: Tensor, dim: int) -> Tensor:
        """Weights `[n, dim]` of rows that get another id: the same on any number of ranks."""
        bucket = rows.div(ids.bucket_rows, rounding_mode="floor") + ids.first_bucket
        drawn = []
        for number, count in zip(*(column.tolist() for column in torch.unique_consecutive(bucket, return_counts=True))):
            key = f"{self.seed}/{table}/{number}/{ids.step}"
            stream = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            drawn.append(torch.randn(count, dim, generator=stream))
        return torch.cat(drawn) * self.std.get(table, dim**-0.5)


class ManagedCollectionSharder(ManagedCollisionEmbeddingCollectionSharder):
    """Shards managed collections row-wise, whole buckets to a rank.

    Args:
        tables: Shards what is inside.
    """

    def __init__(self, tables: EmbeddingCollectionSharder) -> None:
        super().__init__(ec_sharder=tables)

    def shard(
        self,
        module: ManagedCollisionEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollection:
        """This rank's part of a collection."""
        return ShardedManagedCollection(
            module,
            params,
            ec_sharder=self._e_sharder,
            mc_sharder=self._mc_sharder,
            env=env,
            device=device or torch.device("cuda"),
        )


def start_rows_like(model: nn.Module, std: Mapping[str, float], seed: int) -> None:
    """Say how rows that get another id start.

    Args:
        model: The sharded model.
        std: Standard deviation of each table's weights.
        seed: Seed of the run.
    """
    for module in model.modules():
        if isinstance(module, ShardedManagedCollection):
            module.seed, module.std = seed, dict(std)
