"""Whole runs under other plans and settings of tables: the same model, interrupted or not."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mufasa_rec.config import RunConfig
from mufasa_rec.data.batch import Batch
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding_config import ShardingConfig, TableSharding
from mufasa_rec.distributed.table_config import TablesConfig, TableSettings
from mufasa_rec.training.preemption import Preempted
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps.train import refuse_on, train

COLUMNS = ShardingConfig(types=("column_wise",), min_columns=8)
MIXED = ShardingConfig(
    tables={"item": TableSharding(types=("table_wise",)), "content.title": TableSharding(types=("column_wise",))}
)
OWN_SHARDING = replace(COLUMNS, tables={"item.kind": TableSharding(types=("row_wise",))})
OWN_TABLES = TablesConfig(
    weight_dtype="fp16",
    output_dtype="fp16",
    each={
        "item": TableSettings(weight_dtype="fp32", learning_rate=0.02),
        "item.kind": TableSettings(optimizer="row_wise_adagrad"),
        "item.genres": TableSettings(frozen=True),
    },
)


def stopped_at(env: DistributedEnv, config: RunConfig, folder: Path, step: int) -> str:
    """Train until a step, after which this process is asked to stop."""
    steps = 0

    def watch(batch: Batch) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(config, folder, env, watch)
    except Preempted:
        return "stopped"
    return "done"


@pytest.fixture(scope="module")
def by_rows(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    run_ranks(train_in, 2, small_config(dataset, max_steps=12), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("sharding", [COLUMNS, MIXED], ids=["column_wise", "mixed"])
def test_run_under_another_plan_is_the_same_run(
    dataset: str, by_rows: Path, tmp_path: Path, sharding: ShardingConfig
) -> None:
    run_ranks(train_in, 2, replace(small_config(dataset, max_steps=12), sharding=sharding), tmp_path / "run")
    losses = [[line["loss"] for line in metrics_of(run, "train")] for run in (by_rows, tmp_path / "run")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    one, other = weights_of(by_rows), weights_of(tmp_path / "run")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        if name.startswith("model."):
            assert torch.linalg.norm(weight - other[name]) <= 1e-3 * torch.linalg.norm(weight) + 1e-6, name


def test_interrupted_run_with_settings_of_its_own_ends_bit_for_bit(dataset: str, tmp_path: Path) -> None:
    config = replace(small_config(dataset, max_steps=12), tables=OWN_TABLES, sharding=OWN_SHARDING)
    run_ranks(train_in, 2, config, tmp_path / "whole")
    assert run_ranks(stopped_at, 2, config, tmp_path / "parts", 5) == ["stopped", "stopped"]
    run_ranks(train_in, 2, config, tmp_path / "parts")
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name
    types = {name.split(".")[-2]: weight.dtype for name, weight in whole.items() if name.startswith("model.sparse")}
    assert types["t_item"] == torch.float32
    assert types["t_item_genres"] == torch.float16
    losses = [line["loss"] for line in metrics_of(tmp_path / "whole", "train")]
    assert losses[-1] < losses[0]


def test_what_the_devices_lack_is_refused_before_a_folder_is_made(dataset: str) -> None:
    one = DistributedEnv(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    config = small_config(dataset)
    for changed in (
        replace(config, tables=TablesConfig(weight_dtype="bf16")),
        replace(config, sharding=ShardingConfig(kernels=("fused_uvm",))),
        replace(config, sharding=ShardingConfig(group_size=2)),
    ):
        with pytest.raises(ValueError, match="choose"):
            refuse_on(changed, one)
