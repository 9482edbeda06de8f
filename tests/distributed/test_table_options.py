"""Tables under every option that a CPU has: trained over two ranks they become what plain torch makes of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding_config import ShardingConfig, TableSharding
from mufasa_rec.distributed.table_config import TableOptimizerConfig, TablesConfig, TableSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.table_training import (
    SIZES,
    WORLD,
    Trial,
    sharded_model,
    train_plain,
    train_sharded,
    whole_tables,
)

COLUMN_WISE = ShardingConfig(types=("column_wise",), min_columns=8)
MIXED = ShardingConfig(
    tables={"item": TableSharding(types=("column_wise",)), "item.brand": TableSharding(types=("table_wise",))},
    min_columns=16,
)
TABLE_WISE = ShardingConfig(types=("table_wise",))
ALL_FROZEN = TablesConfig(each={name: TableSettings(frozen=True) for name in SIZES})
OWN_WAYS = TablesConfig(
    each={
        "item": TableSettings(optimizer="row_wise_adagrad", learning_rate=0.3),
        "item.brand": TableSettings(optimizer="sgd", learning_rate=1.0),
        "user": TableSettings(frozen=True),
    }
)


def rate(name: str, learning_rate: float = 0.1) -> TableOptimizerConfig:
    return TableOptimizerConfig(name=name, learning_rate=learning_rate)  # type: ignore[arg-type]


EXACT = {
    "row_wise": Trial(optimizer=rate("adagrad")),
    "row_wise, row-wise": Trial(optimizer=rate("row_wise_adagrad")),
    "row_wise, sgd": Trial(optimizer=rate("sgd")),
    "table_wise": Trial(sharding=TABLE_WISE, optimizer=rate("adagrad")),
    "table_wise, row-wise": Trial(sharding=TABLE_WISE, optimizer=rate("row_wise_adagrad")),
    "column_wise": Trial(sharding=COLUMN_WISE, optimizer=rate("adagrad")),
    "column_wise, sgd": Trial(sharding=COLUMN_WISE, optimizer=rate("sgd")),
    "mixed": Trial(sharding=MIXED, optimizer=rate("adagrad")),
    "own ways": Trial(tables=OWN_WAYS),
    "own rate": Trial(tables=TablesConfig(each={"item": TableSettings(learning_rate=0.3)})),
    "one frozen": Trial(tables=TablesConfig(each={"item": TableSettings(frozen=True)})),
    "all frozen": Trial(tables=ALL_FROZEN),
}
# Without a second moment, by which Adagrad's first step would make the sign of a gradient near zero count.
SGD = rate("sgd", 1.0)
HALF = {
    "weights": Trial(tables=TablesConfig(weight_dtype="fp16"), optimizer=SGD),
    "vectors": Trial(tables=TablesConfig(output_dtype="fp16"), optimizer=SGD),
    "weights and vectors": Trial(tables=TablesConfig(weight_dtype="fp16", output_dtype="fp16"), optimizer=SGD),
    "one table": Trial(
        tables=TablesConfig(each={"item": TableSettings(output_dtype="fp16", weight_dtype="fp16")}), optimizer=SGD
    ),
    "forward": Trial(sharding=ShardingConfig(forward_comms="fp16"), optimizer=SGD),
    "backward": Trial(sharding=ShardingConfig(backward_comms="fp16"), optimizer=SGD),
    "exchange": Trial(
        sharding=ShardingConfig(types=("table_wise",), forward_comms="fp16", backward_comms="fp16"), optimizer=SGD
    ),
}
REFUSED = {
    "sharding.kernels: 'fused_uvm'": Trial(sharding=ShardingConfig(kernels=("fused_uvm",))),
    "sharding.tables['user'].kernels: 'fused_uvm_caching'": Trial(
        sharding=ShardingConfig(tables={"user": TableSharding(kernels=("fused_uvm_caching",))})
    ),
    "sharding.kernels: 'key_value'": Trial(sharding=ShardingConfig(kernels=("key_value",), ssd_folder="ssd")),
    "sharding.forward_comms='bf16'": Trial(sharding=ShardingConfig(forward_comms="bf16")),
    "sharding.backward_comms='bf16'": Trial(sharding=ShardingConfig(backward_comms="bf16")),
    "sharding.group_size=1: TorchRec keeps several copies": Trial(sharding=ShardingConfig(group_size=1)),
    "sharding.group_size=3: must divide the 2 ranks": Trial(sharding=ShardingConfig(group_size=3)),
    "'itm' is no table": Trial(sharding=ShardingConfig(tables={"itm": TableSharding()})),
    "'column_wise' may cut table 'item'": Trial(sharding=COLUMN_WISE, optimizer=rate("row_wise_adagrad")),
}


def train_all(env: DistributedEnv, trials: dict[str, Trial]) -> dict[str, dict[str, Any]]:
    return {name: train_sharded(env, trial) for name, trial in trials.items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    """What every trial came to, by rank."""
    ranks = run_ranks(train_all, WORLD, {**EXACT, **HALF})
    return {name: [rank[name] for rank in ranks] for name in (*EXACT, *HALF)}


@pytest.fixture(scope="module")
def first() -> dict[str, Tensor]:
    """First weights, those of a trial that learns nothing, on one rank."""
    return whole_tables(run_ranks(train_sharded, 1, Trial(tables=ALL_FROZEN)))


def compare(found: list[dict[str, Any]], trial: Trial, first: dict[str, Tensor], tolerance: float) -> None:
    """Losses and tables must be those of plain torch, to a tolerance."""
    losses, tables = train_plain(first, trial)
    for rank, result in enumerate(found):
        torch.testing.assert_close(
            torch.tensor(result["losses"]), torch.tensor(losses[rank]), rtol=tolerance, atol=tolerance
        )
    for name, table in whole_tables(found).items():
        torch.testing.assert_close(table, tables[name], rtol=tolerance, atol=tolerance)
        assert trial.tables.is_frozen(name) == torch.equal(table, first[name]), name


@pytest.mark.parametrize("name", EXACT)
def test_sharded_tables_become_what_plain_torch_makes_of_them(
    trained: dict[str, list[dict[str, Any]]], first: dict[str, Tensor], name: str
) -> None:
    compare(trained[name], EXACT[name], first, 1e-5)


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_near_full_precision_and_not_equal(
    trained: dict[str, list[dict[str, Any]]], first: dict[str, Tensor], name: str
) -> None:
    found, trial = trained[name], HALF[name]
    compare(found, trial, first, 2e-3)
    assert found[0]["losses"] != trained["row_wise, sgd"][0]["losses"]
    wanted = torch.float16 if trial.tables.weight_dtype_of("item") == "fp16" else torch.float32
    assert {weight.dtype for result in found for _, _, weight in result["shards"].get("t_item", ())} == {wanted}


def test_column_wise_shards_are_parts_of_rows(trained: dict[str, list[dict[str, Any]]]) -> None:
    cut = [part for result in trained["column_wise"] for part in result["shards"]["t_item"]]
    assert sorted((column, tuple(weight.shape)) for _, column, weight in cut) == [
        (column, (41, 8)) for column in (0, 8, 16, 24)
    ]


def test_frozen_tables_have_no_optimizer_state(trained: dict[str, list[dict[str, Any]]]) -> None:
    states = {name.split(".")[-2]: state for name, state in trained["own ways"][0]["states"].items()}
    assert states.get("t_item")
    assert "t_user" not in states
    assert trained["all frozen"][0]["states"] == {}


def what_is_refused(env: DistributedEnv) -> list[str]:
    said = []
    for trial in REFUSED.values():
        try:
            sharded_model(env, trial)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_a_cpu_cannot_do_is_refused_by_name_at_the_start() -> None:
    for said in run_ranks(what_is_refused, WORLD):
        for wanted, found in zip(REFUSED, said, strict=True):
            assert wanted in found


USER = {"user": TableSharding(types=("table_wise",))}


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        (ShardingConfig, {"types": ("data_parallel",)}, "sharding.types: 'data_parallel' is not for these tables"),
        (ShardingConfig, {"types": ()}, "sharding.types is empty"),
        (ShardingConfig, {"kernels": ("dense",)}, "sharding.kernels: 'dense'"),
        (
            ShardingConfig,
            {"tables": {"user": replace(USER["user"], cache_share=2.0)}},
            "tables['user'].cache_share=2.0",
        ),
        (ShardingConfig, {"cache_share": 1.5}, "sharding.cache_share=1.5"),
        (ShardingConfig, {"prefetch": True}, "sharding.prefetch=True: no table may be cached"),
        (ShardingConfig, {"kernels": ("key_value",)}, "give sharding.ssd_folder"),
        (ShardingConfig, {"group_size": 0}, "sharding.group_size=0"),
        (ShardingConfig, {"min_columns": 6}, "sharding.min_columns=6"),
        (ShardingConfig, {"forward_comms": "int8"}, "sharding.forward_comms: 'int8'"),
        (TablesConfig, {"weight_dtype": "int8"}, "tables.weight_dtype='int8'"),
        (TableSettings, {"optimizer": "lion"}, "tables.each[...].optimizer='lion'"),
        (TableSettings, {"learning_rate": 0.0}, "frozen: true"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_remedy(made: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        made(**given)


def test_precisions_and_optimizers_that_a_cpu_lacks_are_refused() -> None:
    for tables, said in (
        (TablesConfig(weight_dtype="bf16"), "tables.weight_dtype='bf16'"),
        (TablesConfig(each={"user": TableSettings(output_dtype="bf16")}), "tables.each['user'].output_dtype='bf16'"),
        (TablesConfig(each={"user": TableSettings(optimizer="adam")}), "tables.each['user'].optimizer='adam'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            tables.refuse_on("cpu")
        tables.refuse_on("cuda")


def test_run_trained_with_a_gpus_kernels_can_be_judged_on_a_cpu() -> None:
    trained = ShardingConfig(
        types=("table_wise",),
        kernels=("fused_uvm_caching",),
        tables={"user": TableSharding(kernels=("fused_uvm",), cache_share=0.1)},
        forward_comms="bf16",
        group_size=4,
        prefetch=True,
        plan="plan.json",
    )
    judged = trained.for_judging("cpu")
    judged.refuse_on("cpu", 3)
    assert (judged.types, judged.plan, judged.kernels_of("user")) == (("table_wise",), "", ("fused",))
    on_gpu = trained.for_judging("cuda")
    assert (on_gpu.kernels, on_gpu.group_size, on_gpu.forward_comms) == (("fused_uvm_caching",), None, "bf16")
