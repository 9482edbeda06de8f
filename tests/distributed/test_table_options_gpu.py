"""Tables under the options that only a GPU has: other kernels, bf16, Adam, prefetching, copies in groups of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mufasa_rec.distributed.sharding_config import Kernel, ShardingConfig
from mufasa_rec.distributed.table_config import TableOptimizerConfig, TablesConfig, TableSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in
from tests.helpers.table_training import SIZES, Trial, train_plain, train_sharded, whole_tables

pytestmark = pytest.mark.gpu
ALL_FROZEN = TablesConfig(each={name: TableSettings(frozen=True) for name in SIZES})
SGD = TableOptimizerConfig(name="sgd", learning_rate=1.0)


def check(trial: Trial, tolerance: float, world: int = 1) -> list[dict[str, Any]]:
    """Train on GPUs; losses and tables must be those of plain torch, to a tolerance."""
    first = whole_tables(run_ranks(train_sharded, 1, Trial(tables=ALL_FROZEN)))
    found = run_ranks(train_sharded, world, trial, on_gpus=True)
    losses, tables = train_plain(first, trial, world)
    for rank, result in enumerate(found):
        assert result["losses"] == pytest.approx(losses[rank], rel=tolerance)
    for name, table in whole_tables(found).items():
        torch.testing.assert_close(table, tables[name], rtol=tolerance, atol=tolerance)
    return found


@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching"])
@pytest.mark.parametrize("optimizer", ["adagrad", "row_wise_adagrad"])
def test_tables_beyond_the_devices_memory_become_what_plain_torch_makes_of_them(kernel: Kernel, optimizer: Any) -> None:
    check(Trial(ShardingConfig(kernels=(kernel,)), optimizer=TableOptimizerConfig(name=optimizer)), 1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_is_near_full_precision(dtype: Any) -> None:
    tolerance = 3e-3 if dtype == "fp16" else 2e-2
    sharding = ShardingConfig(forward_comms=dtype, backward_comms=dtype)
    check(Trial(sharding, TablesConfig(weight_dtype=dtype, output_dtype=dtype), SGD), tolerance)


def test_rows_on_an_ssd_are_trained(tmp_path: Path) -> None:
    sharding = ShardingConfig(kernels=("key_value",), ssd_folder=str(tmp_path))
    (found,) = run_ranks(train_sharded, 1, Trial(sharding), on_gpus=True)
    assert found["losses"][-1] < found["losses"][0]


def test_adam_lowers_the_loss() -> None:
    (found,) = run_ranks(train_sharded, 1, Trial(optimizer=TableOptimizerConfig(name="adam")), on_gpus=True)
    assert found["losses"][-1] < found["losses"][0]


def test_run_with_prefetching_is_the_run_without(dataset: str, tmp_path: Path) -> None:
    cached = ShardingConfig(kernels=("fused_uvm_caching",), cache_share=0.5)
    for name, sharding in (("without", cached), ("with", replace(cached, prefetch=True))):
        config = replace(small_config(dataset, max_steps=10), sharding=sharding)
        run_ranks(train_in, 1, config, tmp_path / name, on_gpus=True)
    losses = [[line["loss"] for line in metrics_of(tmp_path / name, "train")] for name in ("without", "with")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_groups_of_ranks_keep_equal_tables() -> None:
    found = run_ranks(train_sharded, 2, Trial(ShardingConfig(group_size=1), optimizer=SGD), on_gpus=True)
    check(Trial(optimizer=SGD), 1e-4, world=2)
    one, other = (whole_tables([result]) for result in found)
    for name, table in one.items():
        torch.testing.assert_close(table, other[name])
