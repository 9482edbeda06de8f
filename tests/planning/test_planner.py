"""The planner: bytes as arithmetic gives them, what fits and what does not, and remedies that were planned."""

from dataclasses import replace
from typing import Any

import pytest

from mufasa_rec.config import RunConfig
from mufasa_rec.data.loader import DataConfig
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.content_config import ContentConfig, ContentSettings
from mufasa_rec.distributed.id_policy import IdPolicyConfig, IdsConfig, ManagedIdsConfig
from mufasa_rec.distributed.sharding_config import ShardingConfig, TableSharding
from mufasa_rec.distributed.table_config import TableOptimizerConfig, TablesConfig, TableSettings
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.planning.load import StepLoad
from mufasa_rec.planning.report import PlanReport, TablePlan, page
from mufasa_rec.planning.topology import GIB, Topology
from mufasa_rec.presets import preset
from mufasa_rec.training.optim import OptimizerConfig
from torchx_apps.imagined import imagined_manifest
from torchx_apps.plan_run import describe, plan_run

ITEMS = 50_000_000
CATALOG = imagined_manifest(items=ITEMS, content={"title": 64})


def run(optimizer: str = "row_wise_adagrad", **changes: Any) -> RunConfig:
    tables = TableOptimizerConfig(name=optimizer)  # type: ignore[arg-type]
    base = RunConfig(
        data=DataConfig(batch_size=512, max_history=100),
        model=RetrieverConfig(width=128),
        optimizer=OptimizerConfig(tables=tables),
    )
    return replace(base, **changes)


def plan(config: RunConfig, text: str = "8xH100", manifest: DatasetManifest = CATALOG, **hardware: Any) -> PlanReport:
    return plan_run(config, manifest, Topology.parse(text, **hardware))


@pytest.mark.parametrize(
    ("optimizer", "dtype", "weights", "state"),
    [
        ("row_wise_adagrad", "fp32", 512, 4),
        ("adagrad", "fp32", 512, 512),
        ("adam", "fp16", 256, 1024),
        ("sgd", "bf16", 256, 0),
        ("adagrad", "fp16", 256, 512),
    ],
)
def test_bytes_of_a_table_are_those_of_its_weights_and_state(
    optimizer: str, dtype: Any, weights: int, state: int
) -> None:
    report = plan(run(optimizer, tables=TablesConfig(weight_dtype=dtype)))
    item = next(table for table in report.tables if table.name == "item")
    assert (item.rows, item.dim, item.dtype, item.optimizer) == (ITEMS + 1, 128, dtype, optimizer)
    assert item.weight_bytes == (ITEMS + 1) * weights
    assert item.state_bytes == (ITEMS + 1) * state
    assert item.bytes == item.weight_bytes + item.state_bytes


def test_every_rank_holds_its_part_of_everything() -> None:
    report = plan(run())
    assert report.fits
    tables = sum(rank.parts["tables"] for rank in report.ranks)
    content = sum(rank.parts["content"] for rank in report.ranks)
    assert tables == (ITEMS + 1) * (512 + 4)
    assert content == ITEMS * 64 * 2
    for rank in report.ranks:
        assert rank.hbm_bytes == sum(rank.parts.values())
        assert rank.parts["dense"] > 0
        assert rank.parts["activations"] > 0
        assert rank.ddr_bytes == 0


def test_frozen_table_costs_no_state_and_no_backward() -> None:
    usual = plan(run("adagrad"))
    frozen = plan(run("adagrad", tables=TablesConfig(each={"item": TableSettings(frozen=True)})))
    item = next(table for table in frozen.tables if table.name == "item")
    assert (item.optimizer, item.state_bytes) == ("frozen", 0)
    assert usual.step_parts["update"] > 0
    assert frozen.step_parts["update"] == 0


def test_parts_add_up_to_the_step_and_the_bottleneck_is_the_longest() -> None:
    report = plan(run())
    shown = {name: ms for name, ms in report.step_parts.items() if "hidden" not in name}
    assert report.step_time_ms == pytest.approx(sum(shown.values()))
    assert shown[report.bottleneck] == max(shown.values())


def test_slower_network_makes_the_exchange_longer_and_nothing_shorter() -> None:
    fast, slow = plan(run(), "2x8xH100"), plan(run(), "2x8xH100", inter_node_gb_s=4.5)
    assert slow.step_parts["all-to-all"] == pytest.approx(10 * fast.step_parts["all-to-all"], rel=0.05)
    assert all(slow.step_parts[name] >= ms for name, ms in fast.step_parts.items())


def test_half_precision_exchange_takes_half_the_time_but_for_its_copy() -> None:
    whole = plan(run(), "2x8xH100")
    half = plan(run(sharding=ShardingConfig(forward_comms="fp16", backward_comms="bf16")), "2x8xH100")
    assert half.step_parts["all-to-all"] == pytest.approx(whole.step_parts["all-to-all"] / 2, rel=0.2)


def test_cached_table_lies_in_host_memory_behind_a_cache_on_the_device() -> None:
    sharding = ShardingConfig(kernels=("fused_uvm_caching",), cache_share=0.1)
    report, fused = plan(run(sharding=sharding)), plan(run())
    tables = {table.name: table for table in report.tables}
    assert {table.compute_kernel for table in tables.values()} == {"fused_uvm_caching"}
    held = sum(rank.ddr_bytes for rank in report.ranks)
    assert held == sum(table.bytes for table in tables.values())
    assert report.fullest.hbm_bytes < fused.fullest.hbm_bytes
    assert report.fullest.hbm_bytes > 0.1 * held / 8


def test_rows_on_an_ssd_are_counted_there() -> None:
    only = TableSharding(kernels=("key_value",))
    report = plan(run(sharding=ShardingConfig(tables={"item": only}, ssd_folder="/ssd")))
    item = next(table for table in report.tables if table.name == "item")
    assert item.compute_kernel == "key_value"
    assert sum(rank.ssd_bytes for rank in report.ranks) == item.bytes


def test_group_of_ranks_holds_a_whole_copy() -> None:
    alone, pairs = plan(run(), "2x8xH100"), plan(run(sharding=ShardingConfig(group_size=4)), "2x8xH100")
    assert len(pairs.ranks) == 4
    assert pairs.ranks[0].parts["tables"] == pytest.approx(4 * alone.ranks[0].parts["tables"], rel=1e-6)
    assert pairs.step_parts["average of the groups"] > 0
    assert "average of the groups" not in alone.step_parts
    rarer = plan(run(sharding=ShardingConfig(group_size=4, sync_every=10)), "2x8xH100")
    assert rarer.step_parts["average of the groups"] == pytest.approx(pairs.step_parts["average of the groups"] / 10)


def test_what_does_not_fit_says_what_is_needed_and_what_was_planned_again() -> None:
    report = plan(run("adagrad"), "2xH100", hbm_bytes=20 * GIB)
    assert not report.fits
    assert "does not fit" in report.verdict
    assert report.document == {}
    needed = (ITEMS + 1) * 1024 / 2
    assert report.fullest.hbm_bytes > needed
    by_change = {remedy.change: remedy for remedy in report.remedies}
    assert by_change["row-wise optimizer"].memory_bytes < report.fullest.hbm_bytes
    assert by_change["4 ranks instead of 2"].fits
    assert not by_change["fp16 weights"].fits
    assert by_change["width 64"].fits
    assert by_change["fp16 weights and row-wise optimizer and tables in host memory behind a cache"].fits
    assert [remedy.fits for remedy in report.remedies] == sorted((r.fits for r in report.remedies), reverse=True)


def test_remedy_says_what_its_own_plan_says() -> None:
    report = plan(run("adagrad"), "2xH100", hbm_bytes=20 * GIB)
    remedy = next(one for one in report.remedies if one.change == "row-wise optimizer")
    assert remedy.options == "--optimizer.tables.name row_wise_adagrad"
    again = plan(run("row_wise_adagrad"), "2xH100", hbm_bytes=20 * GIB)
    assert (remedy.fits, remedy.memory_bytes) == (again.fits, again.fullest.hbm_bytes)
    assert remedy.step_time_ms == again.step_time_ms


def test_page_names_tables_verdict_and_remedies() -> None:
    said = page(plan(run("adagrad"), "2xH100", hbm_bytes=20 * GIB))
    for part in ("content.title", "row_wise", "does not fit", "--tables.weight-dtype fp16", "estimate", "fullest"):
        assert part in said


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (run(sharding=ShardingConfig(kernels=("fused_uvm",))), "sharding.kernels"),
        (run(sharding=ShardingConfig(backward_comms="bf16")), "sharding.backward_comms"),
        (run(sharding=ShardingConfig(group_size=1)), "sharding.group_size"),
        (run(tables=TablesConfig(weight_dtype="bf16")), "tables.weight_dtype"),
        (run("adam"), "optimizer.tables.name"),
        (run(sharding=ShardingConfig(tables={"itme": TableSharding()})), "sharding.tables: 'itme'"),
        (run(tables=TablesConfig(each={"itme": TableSettings()})), "tables.each: 'itme'"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_by_name(config: RunConfig, field: str) -> None:
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        plan(config, "2xCPU")


def test_ranking_run_is_planned_with_its_tables() -> None:
    shown = imagined_manifest(items=1_000_000, content={"title": 64}, users=2_000_000)
    report = plan(preset("ranking"), "2xH100", shown)
    assert {table.name for table in report.tables} == {"item", "user", "content.title"}
    assert report.fits
    assert next(table for table in report.tables if table.name == "user").rows == 2_000_001


def content_of(report: PlanReport) -> TablePlan:
    return next(table for table in report.tables if table.name == "content.title")


def test_placement_of_content_is_named_and_its_bytes_are_counted_where_they_lie() -> None:
    sharded, host = plan(run()), plan(run(content=ContentConfig(placement="host")))
    vectors = ITEMS * 64 * 2
    assert (content_of(sharded).sharding_type, content_of(sharded).compute_kernel) == ("row_wise", "fused")
    table = content_of(host)
    assert (table.sharding_type, table.compute_kernel, table.dtype) == ("host", "memory_map", "fp16")
    assert (table.bytes, table.bytes_per_rank) == (vectors, vectors / 8)
    assert "memory_map" in page(host)
    batch = load_of(run()).ids["content.title"] * 64 * 2
    for before, rank in zip(sharded.ranks, host.ranks):
        assert before.ddr_bytes == 0
        assert rank.ddr_bytes == vectors / 8 + 3 * batch  # two batches made ahead, one in the making
        assert rank.parts["content"] == vectors / 8
    assert sum(rank.hbm_bytes for rank in sharded.ranks) - sum(rank.hbm_bytes for rank in host.ranks) > 0.9 * vectors


def test_copy_of_content_is_hidden_until_it_takes_longer_than_the_step() -> None:
    config = run(content=ContentConfig(placement="host"))
    usual, slow = plan(config), plan(config, host_link_gb_s=0.01)
    assert usual.step_parts["content's copy (hidden)"] < usual.step_time_ms
    assert slow.step_time_ms == slow.step_parts["content's copy (hidden)"] > usual.step_time_ms
    assert slow.bottleneck == "content's copy (hidden)"


def test_host_holds_content_once_a_node() -> None:
    config = run(content=ContentConfig(placement="host"))
    one, two = (plan(config, text).ranks[0].parts["content"] for text in ("8xH100", "2x8xH100"))
    assert one == two
    assert content_of(plan(config, "4xCPU", ddr_bytes=100 * GIB)).bytes_per_rank == ITEMS * 64 * 2 / 4


def test_content_in_eight_bits_takes_half_and_its_scale() -> None:
    report = plan(run(content=ContentConfig(precision="int8")))
    table = content_of(report)
    assert (table.dtype, table.dim, table.sharding_type) == ("int8", 64, "row_wise")
    assert table.bytes == ITEMS * 36 * 2  # 32 pairs, a scale, padded to a multiple of 4
    assert sum(rank.parts["content"] for rank in report.ranks) == table.bytes


def test_content_that_does_not_fit_is_offered_another_place() -> None:
    large = imagined_manifest(items=ITEMS, content={"title": 1024})
    report = plan(run(), "1x1xH100", large)
    assert not report.fits
    options = {remedy.options: remedy for remedy in report.remedies}
    assert options["--content.placement host"].fits
    assert "--content.precision int8" in options
    without = plan(run(), "1x1xH100", imagined_manifest(items=20 * ITEMS))
    assert not without.fits
    assert not any("content" in remedy.options for remedy in without.remedies)
    assert not any("host" in remedy.options for remedy in plan(run(), "1xCPU", large, ddr_bytes=GIB).remedies)


def test_modality_that_there_is_not_cannot_be_placed() -> None:
    unknown = ContentConfig(each={"sound": ContentSettings(placement="host")})
    with pytest.raises(ValueError, match=r"content\.each: 'sound' is no modality of this run; there are title"):
        plan(run(content=unknown))


def load_of(config: RunConfig) -> StepLoad:
    return describe(config, CATALOG, Topology.parse("8xH100"))[1]


def test_ids_of_managed_rows_are_counted_beside_weights_and_state() -> None:
    managed = IdPolicyConfig(policy="managed_collision", rows=1 << 20, managed=ManagedIdsConfig(eviction="lru"))
    report = plan(run(ids=IdsConfig(item=managed)))
    item = next(table for table in report.tables if table.name == "item")
    assert (item.rows, item.weight_bytes, item.state_bytes) == (1 << 20, 512 << 20, (4 + 24) << 20)


def test_rows_by_multi_probe_are_planned_for_gpus_and_refused_on_a_cpu() -> None:
    probed = ManagedIdsConfig(method="multi_probe", eviction="lru")
    ids = IdsConfig(item=IdPolicyConfig(policy="managed_collision", rows=1 << 20, managed=probed))
    item = next(table for table in plan(run(ids=ids)).tables if table.name == "item")
    assert (item.rows, item.sharding_type, item.compute_kernel) == (1 << 20, "row_wise", "fused")
    assert item.state_bytes == (4 + 12) << 20
    with pytest.raises(ValueError, match=r"ids\.item\.managed\.method='multi_probe': FBGEMM's kernel gives rows"):
        plan(run(ids=ids), "2xCPU")
