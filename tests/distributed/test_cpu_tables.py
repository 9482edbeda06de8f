"""Unpooled lookups on a CPU as sums over bags of one id: the same vectors, the same updates."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from mufasa_rec.distributed.cpu_tables import BagsOfOne, unpooled_tables
from mufasa_rec.distributed.env import distributed
from torchx_apps.benchmarks._table import sharded_table

DIM, ROWS = 8, (50, 7, 20)
# Ids of each feature, feature by feature; tables of the features; lists of a feature.
CASES = {
    "one feature": ([[3, 3, 49, 0]], [0], 1),
    "features of unlike sizes": ([[1, 2, 2, 2, 40], [], [5, 5]], [0, 1, 2], 1),
    "two features of one table": ([[9, 8], [9, 9, 1], [6]], [0, 0, 1], 1),
    "two ranks' lists": ([[4, 4, 7], [1, 0], [3, 19, 19, 19]], [0, 1, 2], 2),
    "nothing at all": ([[], [], []], [0, 1, 2], 1),
}


def tables(
    features: list[int], optimizer: EmbOptimType, weights: SparseType, output: SparseType
) -> SplitTableBatchedEmbeddingBagsCodegen:
    made = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS[: max(features) + 1]],
        feature_table_map=features,
        optimizer=optimizer,
        learning_rate=0.3,
        weights_precision=weights,
        output_dtype=output,
        pooling_mode=PoolingMode.NONE,
        device=torch.device("cpu"),
    )
    torch.manual_seed(1)
    for weight in made.split_embedding_weights():
        weight.copy_(torch.randn(weight.shape))
    return made


def as_bags(made: SplitTableBatchedEmbeddingBagsCodegen) -> SplitTableBatchedEmbeddingBagsCodegen:
    made.__class__, made.pooling_mode = BagsOfOne, PoolingMode.SUM
    return made


def request(ids: list[list[int]], lists: int) -> tuple[Tensor, Tensor]:
    """Ids of every feature, cut into as many lists, of unlike lengths."""
    lengths = []
    for mine in ids:
        lengths += [len(mine)] if lists == 1 else [1 if mine else 0, len(mine) - (1 if mine else 0)]
    flat = torch.tensor([i for mine in ids for i in mine], dtype=torch.int64)
    return flat, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["EXACT_SGD", "EXACT_ROWWISE_ADAGRAD", "EXACT_ADAGRAD"])
@pytest.mark.parametrize(("weights", "output"), [("FP32", "FP32"), ("FP16", "FP32"), ("FP16", "FP16")])
def test_bags_of_one_look_up_and_learn_as_ids_do(case: str, optimizer: str, weights: str, output: str) -> None:
    ids, features, lists = CASES[case]
    made = [tables(features, EmbOptimType[optimizer], SparseType[weights], SparseType[output]) for _ in range(2)]
    plain, bags = made[0], as_bags(made[1])
    flat, offsets = request(ids, lists)
    torch.manual_seed(2)
    rtol, atol = (1e-5, 1e-6) if weights == "FP32" else (1e-2, 2e-3)
    for step in range(3):
        expected, got = plain(flat, offsets), bags(flat, offsets)
        assert got.shape == (len(flat), DIM) and got.dtype == expected.dtype
        if step == 0:
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
        weight = torch.randn(got.shape).to(got.dtype)
        expected.backward(weight)
        got.backward(weight)
    for one, two in zip(plain.split_embedding_weights(), bags.split_embedding_weights(), strict=True):
        torch.testing.assert_close(two, one, rtol=rtol, atol=atol)
    for one, two in zip(plain.split_optimizer_states(), bags.split_optimizer_states(), strict=True):
        for state, other in zip(one, two, strict=True):
            torch.testing.assert_close(other, state, rtol=rtol, atol=atol)


def test_a_weight_for_each_id_is_refused() -> None:
    bags = as_bags(tables([0, 1, 2], EmbOptimType.EXACT_SGD, SparseType.FP32, SparseType.FP32))
    flat, offsets = request([[1], [2], [3]], 1)
    with pytest.raises(ValueError, match="per_sample_weights"):
        bags(flat, offsets, per_sample_weights=torch.ones(3))


def test_a_sharded_model_on_a_cpu_looks_its_tables_up_so() -> None:
    with distributed():
        model = sharded_table(100, DIM, torch.device("cpu"))
        assert [type(found) for found in unpooled_tables(model)] == [BagsOfOne]
