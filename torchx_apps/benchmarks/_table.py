"""One table to be measured: sharded as a run shards it, and FBGEMM's own module with the same weights."""

from __future__ import annotations

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.table_config import Precision, TableOptimizerConfig
from mufasa_rec.modules.sparse_arch import SparseArch, TableConfig, merge

RATE = 0.5
FEATURE = "item"
RawTable = SplitTableBatchedEmbeddingBagsCodegen


class Lookup(nn.Module):
    """Looks one table up, and nothing else: without a data-parallel weight nothing is wrapped either."""

    def __init__(self, sparse: SparseArch) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Vectors `[ids, dim]`."""
        return merge(self.sparse(features))[FEATURE]


def sharded_table(
    rows: int, dim: int, device: torch.device, dtype: Precision = "fp32", optimizer: str = "row_wise_adagrad"
) -> nn.Module:
    """A table as a run has it: row-wise over several ranks, whole on one."""
    sparse = SparseArch(
        [TableConfig(name=FEATURE, num_embeddings=rows, weight_dtype=dtype)], dim, [], torch.device("meta")
    )
    config = TableOptimizerConfig(name=optimizer, learning_rate=RATE)  # type: ignore[arg-type]
    sharding.fuse_optimizer(sparse.trained, config)
    model = Lookup(sparse)
    return sharding.shard(model, sharding.make_plan(model, device), device)


def raw_table(rows: int, dim: int, device: torch.device) -> RawTable:
    """FBGEMM's module for the same table, with plain gradient descent."""
    on_gpu = device.type == "cuda"
    place = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
    return RawTable(
        embedding_specs=[(rows, dim, place, ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=RATE,
        weights_precision=SparseType.FP32,
        pooling_mode=PoolingMode.NONE,
        device=device,
    )


def as_bags_of_one(table: RawTable) -> RawTable:
    """The same, called as a run on a CPU calls it."""
    table.pooling_mode = PoolingMode.SUM  # the benchmark's offsets are bags of one id
    return table


def features_of(ids: Tensor) -> KeyedJaggedTensor:
    """Ids as a batch has them: one list."""
    return KeyedJaggedTensor(keys=[FEATURE], values=ids, lengths=torch.tensor([len(ids)], device=ids.device), stride=1)
