"""Tables on a CPU: unpooled lookups by FBGEMM's pooled kernels, as sums over bags of one id.

TorchRec looks the ids of an `EmbeddingCollection` up without pooling. FBGEMM's CPU kernel for that gathers gradients in
a hash map of vectors, a memory allocation for every id; its pooled kernels prefetch rows, sort ids and update rows one
after the other. A bag of one id is its row, so both give the same numbers: looked-up vectors to the bit, updates up to
the order in which the gradients of a repeated id are added. Large tables are moved into large pages besides. `benchmark
tables` has the times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from mufasa_rec.distributed.host_memory import use_large_pages


class BagsOfOne(SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's tables of one width, whose features are looked up one vector for each id."""

    def forward(self, indices: Tensor, offsets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up.

        Args:
            indices: Ids of all features, feature by feature, `[N]`.
            offsets: Offsets of as many lists of every feature, feature by feature, `[features * lists + 1]`.
            args: Nothing.
            kwargs: Nothing.

        Returns:
            Vectors `[N, dim]`.

        Raises:
            ValueError: For what only unpooled or pooled lookups know.
        """
        if args or any(value is not None for value in kwargs.values()):
            raise ValueError(f"tables on a CPU are looked up by ids alone; got {[*args, *kwargs]} too.")
        num_features = len(self.feature_table_map)
        if num_features == 1:
            return super().forward(indices, torch.arange(len(indices) + 1, dtype=offsets.dtype))
        borders = offsets[:: (len(offsets) - 1) // num_features] if len(offsets) > 1 else offsets.new_zeros(1)
        counts = borders.diff().tolist()
        if not indices.numel():
            return super().forward(indices, offsets.new_zeros(num_features + 1))[:0, : self.max_D]
        bags = torch.arange(max(counts), dtype=offsets.dtype)  # a feature with fewer ids has empty bags at its end
        begin = borders[:-1, None] + torch.minimum(bags, borders.diff()[:, None])
        vectors = super().forward(indices, torch.cat([begin.flatten(), borders[-1:]]))
        by_feature = vectors.view(len(bags), num_features, -1)
        return torch.cat([by_feature[:count, number] for number, count in enumerate(counts)])


def speed_up(model: nn.Module) -> None:
    """Let a sharded model's unpooled tables in a CPU's memory be looked up as bags of one id, out of large pages.

    Their weights, optimizer state and everything else of them stay as they are.
    """
    for tables in unpooled_tables(model):
        if not is_unpooled_on_cpu(tables):
            continue
        if type(tables) is SplitTableBatchedEmbeddingBagsCodegen:
            tables.__class__ = BagsOfOne
            tables.pooling_mode = PoolingMode.SUM
        for memory in (tables.weights_host, getattr(tables, "momentum1_host", None)):
            if isinstance(memory, Tensor):
                use_large_pages(memory)


def unpooled_tables(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """What FBGEMM holds of a sharded model's `EmbeddingCollection`s on this rank.

    TorchRec keeps its lookups out of the tree of modules.
    """
    for collection in model.modules():
        if isinstance(collection, ShardedEmbeddingCollection):
            for lookup in collection._lookups:
                for module in lookup.modules():
                    if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                        yield module


def is_unpooled_on_cpu(tables: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether tables are in a CPU's memory and looked up without pooling.

    They must be of one width, and none without rows: FBGEMM's pooled update refuses such a one.
    """
    one_width = len({dim for _, dim, *_ in tables.embedding_specs}) == 1
    all_have_rows = all(rows > 0 for rows, *_ in tables.embedding_specs)
    return bool(tables.use_cpu) and tables.pooling_mode == PoolingMode.NONE and one_width and all_have_rows
